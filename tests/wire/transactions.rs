//! Transactions, good and bad, in both forms, compared with the values written into them.

use std::{collections::BTreeSet, io::BufReader, time::Duration};

use dtc::{
    complaint::Complaints,
    input::transactions::{Transactions, read_all},
    protocol::{ids::ServiceName, message::TransactionSpec},
    wire::hash::{canonical, request_hash},
};
use proptest::prelude::{Strategy, any, prop, proptest};
use serde_json::{Value, json};

use crate::{assert_readable, damage, object, only};

/// Transactions as they are in a file.
fn transactions() -> impl Strategy<Value = Vec<Value>> {
    let services = prop::collection::vec("[A-Za-z0-9_-]{1,10}|[ab]", 1..5);
    let timeout = prop::option::of(1..=86_400_000u32);
    let transaction = (services, object(), timeout);
    let named = prop::collection::btree_map("[A-Za-z0-9._:-]{1,20}", transaction, 0..5);
    named.prop_map(|named| {
        let transactions = named.into_iter().map(|(id, (services, data, timeout))| {
            let mut transaction = json!({"id": id, "involved_services": services, "data": data});
            if let Some(timeout) = timeout {
                transaction["timeout_ms"] = json!(timeout);
            }
            transaction
        });
        transactions.collect()
    })
}

fn lines_of(transactions: &[Value]) -> String {
    transactions.iter().map(|it| format!("{it}\n")).collect()
}

/// Everything that is read, up to the first complaint, through a buffer of `capacity` bytes.
fn open(text: &[u8], capacity: usize) -> Result<Vec<TransactionSpec>, Complaints> {
    match Transactions::open("t.json", BufReader::with_capacity(capacity, text))? {
        Transactions::Array(transactions) => Ok(transactions),
        Transactions::Lines(lines) => lines.collect(),
    }
}

/// Asserts that `transaction` has the values of the file.
fn assert_is(transaction: &TransactionSpec, file: &Value) {
    assert_eq!(transaction.id.as_str(), file["id"]);
    let services = file["involved_services"].as_array().unwrap();
    let services: BTreeSet<_> = services.iter().map(|it| it.as_str().unwrap()).collect();
    assert!(transaction.services.iter().map(ServiceName::as_str).eq(services));
    assert_eq!(transaction.data, canonical(file["data"].as_object().unwrap().clone()));
    let timeout = file["timeout_ms"].as_u64().map(Duration::from_millis);
    assert_eq!(transaction.timeout, timeout);
    let hash = request_hash(&transaction.services, &transaction.data);
    assert_eq!(transaction.request_hash, hash);
}

proptest! {
    #[test]
    fn any_bytes_are_transactions_or_complained_about(
        text in any::<Vec<u8>>(),
        first in prop::sample::select(vec!["", "[", "{", "\n [", "\u{feff}{"]),
    ) {
        let text = [first.as_bytes(), &text].concat();
        for read in [read_all("t.json", &text), open(&text, 8), open(&text, 8192)] {
            if let Err(complaints) = read {
                assert_readable(&complaints, "t.json:");
            }
        }
    }

    #[test]
    fn a_damaged_file_is_transactions_or_complained_about(
        file in transactions(),
        damage in damage(),
    ) {
        for text in [json!(file).to_string(), format!("{}\n", lines_of(&file))] {
            if let Err(complaints) = open(&damage.to(&text), 100) {
                assert_readable(&complaints, "t.json:");
            }
        }
    }

    #[test]
    fn a_good_file_is_read_completely_in_either_form(file in transactions()) {
        let array = json!(file);
        let transactions = read_all("t.json", array.to_string().as_bytes()).unwrap();
        assert_eq!(transactions.len(), file.len());
        transactions.iter().zip(&file).for_each(|(transaction, file)| assert_is(transaction, file));
        let pretty = serde_json::to_vec_pretty(&array).unwrap();
        assert_eq!(open(&pretty, 100).unwrap(), transactions);
        assert_eq!(open(lines_of(&file).as_bytes(), 100).unwrap(), transactions);
        let lines = lines_of(&file).replace('\n', " \r\n\n");
        assert_eq!(open(lines.as_bytes(), 100).unwrap(), transactions);
    }

    #[test]
    fn one_broken_field_is_one_complaint_at_its_place_in_either_form(
        mut file in transactions().prop_filter("there is one", |file| !file.is_empty()),
        at in any::<prop::sample::Index>(),
        (name, value) in prop::sample::select(vec![
            ("id", json!("a b")),
            ("id", json!("x".repeat(129))),
            ("id", json!(1)),
            ("involved_services", json!([])),
            ("involved_services", json!("a")),
            ("data", json!(null)),
            ("data", json!([])),
            ("timeout_ms", json!(0)),
            ("timeout_ms", json!(1.5)),
            ("timeout_ms", json!("1")),
            ("ID", json!("a")),
        ]),
    ) {
        let index = at.index(file.len());
        file[index][name] = value;
        let complaints = read_all("t.json", json!(file).to_string().as_bytes()).unwrap_err();
        let (of_array, path) = only(&complaints);
        assert_eq!(path, format!("$[{index}].{name}"));
        let complaints = open(lines_of(&file).as_bytes(), 100).unwrap_err();
        let (of_line, path) = only(&complaints);
        assert_eq!(path, format!("$.{name}"));
        assert_eq!((&of_line.rule, &of_line.value), (&of_array.rule, &of_array.value));
    }

    #[test]
    fn a_repeated_id_is_a_complaint_in_either_form(
        mut file in transactions().prop_filter("there is one", |file| !file.is_empty()),
        at in any::<prop::sample::Index>(),
    ) {
        let (first, second) = (at.index(file.len()), file.len());
        file.push(file[first].clone());
        let complaints = read_all("t.json", json!(file).to_string().as_bytes()).unwrap_err();
        let (complaint, path) = only(&complaints);
        assert_eq!(path, format!("$[{second}].id"));
        assert_eq!(complaint.rule, format!("must differ from $[{first}].id"));
        let complaints = open(lines_of(&file).as_bytes(), 100).unwrap_err();
        assert_eq!(only(&complaints).1, "$.id");
    }
}
