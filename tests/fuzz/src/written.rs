//! Items made by a program, however odd: each is written and read as it was, except for texts that
//! are cut; with one byte changed it is read, or leads to complaints.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use dtc::{
    protocol::{
        ids::{
            Branch, InstanceId, RequestHash, ServiceName, StoreId, TransactionId, TransactionKey,
            WorkerId,
        },
        message::{
            Answer, Decision, Done, Finish, Inquiry, Outcome, Parked, ParkedCause, Payload,
            Prepare, Query, Reason, ReasonCode, Vote, VoteKind,
        },
        time::Time,
    },
    wire::message::{Cancel, Items, JournalBegun, Settled, TEXT_MAX, decode, decode_request},
};

use crate::bodies::{self, Checked};

const LAST_SECOND: u64 = 253_402_300_799;

/// Items of one kind.
pub fn written(input: &[u8]) {
    let _ = write(&mut Draw(Unstructured::new(input)));
}

fn write(draw: &mut Draw<'_>) -> Result<()> {
    match draw.0.int_in_range(0..=11)? {
        0 => all(draw, Draw::prepare),
        1 => all(draw, |draw| Ok(Query { key: draw.key()?, request_hash: draw.hash()? })),
        2 => all(draw, |draw| draw.key().map(Cancel)),
        3 => all(draw, Draw::finish),
        4 => all(draw, Draw::vote),
        5 => all(draw, Draw::done),
        6 => all(draw, Draw::inquiry),
        7 => all(draw, Draw::decision),
        8 => all(draw, Draw::answer),
        9 => all(draw, Draw::parked),
        10 => all(draw, Draw::settled),
        _ => all(draw, |draw| draw.moment().map(|it| JournalBegun { complete_since: it })),
    }
}

fn all<'a, T: Checked>(
    draw: &mut Draw<'a>,
    mut item: impl FnMut(&mut Draw<'a>) -> Result<T>,
) -> Result<()> {
    let n_items = draw.0.int_in_range(1..=3)?;
    let items: Vec<T> = (0..n_items).map(|_| item(draw)).collect::<Result<_>>()?;
    bodies::are_read_as_written(&items);
    let mut body = Items::new();
    for item in &items {
        let _ = body.push(item);
    }
    let mut body = body.into_body();
    while !draw.0.is_empty() {
        let at = draw.0.int_in_range(0..=body.len() - 1)?;
        body[at] = draw.0.arbitrary()?;
        bodies::items::<T>(&body);
    }
    assert!(decode::<T>(b"[]").is_ok_and(|items| items.is_empty()));
    Ok(())
}

struct Draw<'a>(Unstructured<'a>);

impl Draw<'_> {
    fn name(&mut self, max: usize, extra: &str) -> Result<String> {
        let length = if self.0.ratio(1, 16)? { max } else { self.0.int_in_range(1..=4)? };
        let letters = format!("abcXYZ019{extra}").into_bytes();
        let letter = |draw: &mut Self| draw.0.choose(&letters).map(|it| char::from(*it));
        if length == max {
            Ok(letter(self)?.to_string().repeat(max))
        } else {
            (0..length).map(|_| letter(self)).collect()
        }
    }

    fn service(&mut self) -> Result<ServiceName> {
        Ok(ServiceName::parse(&self.name(64, "_-")?).expect("of its letters"))
    }

    fn instance(&mut self) -> Result<InstanceId> {
        Ok(InstanceId::parse(&self.name(64, "_-")?).expect("of its letters"))
    }

    fn store(&mut self) -> Result<Option<StoreId>> {
        Ok(match self.0.arbitrary()? {
            true => Some(StoreId::parse(&self.name(64, "_-")?).expect("of its letters")),
            false => None,
        })
    }

    fn worker(&mut self) -> Result<WorkerId> {
        Ok(WorkerId::parse(&self.name(64, "_-")?).expect("of its letters"))
    }

    fn id(&mut self) -> Result<TransactionId> {
        Ok(TransactionId::parse(&self.name(128, "._:-")?).expect("of its letters"))
    }

    fn second(&mut self) -> Result<Time> {
        Ok(Time::from_millis(self.0.int_in_range(0..=LAST_SECOND)? * 1000))
    }

    fn moment(&mut self) -> Result<Time> {
        Ok(Time::from_millis(self.0.int_in_range(0..=LAST_SECOND * 1000)?))
    }

    fn key(&mut self) -> Result<TransactionKey> {
        Ok(TransactionKey { id: self.id()?, requested_at: self.second()? })
    }

    fn hash(&mut self) -> Result<RequestHash> {
        self.0.arbitrary().map(RequestHash)
    }

    fn branch(&mut self) -> Result<Branch> {
        Ok(Branch::of(&self.instance()?, self.0.arbitrary()?))
    }

    fn outcome(&mut self) -> Result<Outcome> {
        Ok(if self.0.arbitrary()? { Outcome::Committed } else { Outcome::Aborted })
    }

    /// No longer than what is passed on, and at times as long.
    fn text(&mut self) -> Result<Arc<str>> {
        let text: &str = self.0.arbitrary()?;
        let times = if self.0.ratio(1, 16)? { TEXT_MAX } else { 1 };
        Ok(text.repeat(times).chars().take(TEXT_MAX).collect::<String>().into())
    }

    fn reason(&mut self) -> Result<Reason> {
        let codes = [
            ReasonCode::Refused,
            ReasonCode::Failed,
            ReasonCode::NoSlot,
            ReasonCode::UnknownService,
            ReasonCode::Deadline,
            ReasonCode::Unavailable,
            ReasonCode::Cancelled,
            ReasonCode::Invalid,
            ReasonCode::IdReused,
        ];
        let code = *self.0.choose(&codes)?;
        let service = if self.0.arbitrary()? { Some(self.service()?) } else { None };
        let message = if self.0.arbitrary()? { Some(self.text()?) } else { None };
        Ok(Reason::new(code, service, message))
    }

    /// Any object, with few levels.
    fn data(&mut self) -> Result<Payload> {
        let mut data = String::new();
        self.object(&mut data, 3)?;
        Ok(Payload::new(data))
    }

    fn object(&mut self, out: &mut String, levels: u32) -> Result<()> {
        out.push('{');
        for index in 0..self.0.int_in_range(0..=3)? {
            if index > 0 {
                out.push(',');
            }
            let name: &str = self.0.arbitrary()?;
            out.push_str(&serde_json::Value::from(name).to_string());
            out.push(':');
            match self.0.int_in_range(0..=5)? {
                0 => out.push_str("null"),
                1 => out.push_str("true"),
                2 => out.push_str(&self.0.arbitrary::<i64>()?.to_string()),
                3 => {
                    let text: &str = self.0.arbitrary()?;
                    out.push_str(&serde_json::Value::from(text).to_string());
                }
                4 => out.push_str("-0.5e-7"),
                _ if levels == 0 => out.push_str("[]"),
                _ => self.object(out, levels - 1)?,
            }
        }
        out.push('}');
        Ok(())
    }

    fn prepare(&mut self) -> Result<Prepare> {
        Ok(Prepare {
            key: self.key()?,
            request_hash: self.hash()?,
            data: self.data()?,
            deadline: self.moment()?,
            repeated: self.0.arbitrary()?,
        })
    }

    fn finish(&mut self) -> Result<Finish> {
        let branch = if self.0.arbitrary()? { Some(self.branch()?) } else { None };
        let (key, outcome, parked) = (self.key()?, self.outcome()?, self.0.arbitrary()?);
        Ok(Finish { key, outcome, branch, parked })
    }

    fn vote(&mut self) -> Result<Vote> {
        let kind = match self.0.int_in_range(0..=4)? {
            0 => VoteKind::Prepared { branch: self.branch()? },
            1 => VoteKind::ReadOnly,
            2 => VoteKind::Refused(self.reason()?),
            3 => VoteKind::Failed { branch: self.branch()?, reason: self.reason()? },
            _ => VoteKind::Finished(self.outcome()?),
        };
        Ok(Vote {
            key: self.key()?,
            request_hash: self.hash()?,
            service: self.service()?,
            instance: self.instance()?,
            store: self.store()?,
            kind,
            free: self.0.arbitrary()?,
        })
    }

    fn done(&mut self) -> Result<Done> {
        let applied = if self.0.arbitrary()? { Ok(()) } else { Err(self.text()?) };
        Ok(Done {
            key: self.key()?,
            service: self.service()?,
            instance: self.instance()?,
            store: self.store()?,
            applied,
            parked: self.0.arbitrary()?,
            free: self.0.arbitrary()?,
        })
    }

    fn inquiry(&mut self) -> Result<Inquiry> {
        Ok(Inquiry {
            key: self.key()?,
            request_hash: self.hash()?,
            service: self.service()?,
            instance: self.instance()?,
            branch: self.branch()?,
            deadline: self.moment()?,
        })
    }

    fn decision(&mut self) -> Result<Decision> {
        let n_branches = self.0.int_in_range(0..=4)?;
        let branch = |draw: &mut Self| Ok((draw.service()?, draw.branch()?));
        let mut branches = (0..n_branches).map(|_| branch(self)).collect::<Result<Vec<_>>>()?;
        branches.sort_by(|(a, _), (b, _)| a.cmp(b));
        branches.dedup_by(|(a, _), (b, _)| a == b);
        Ok(Decision {
            key: self.key()?,
            request_hash: self.hash()?,
            outcome: self.outcome()?,
            branches,
            reason: if self.0.arbitrary()? { Some(self.reason()?) } else { None },
            decided_at: self.moment()?,
            worker: self.worker()?,
        })
    }

    fn answer(&mut self) -> Result<Answer> {
        let n_unresolved = self.0.int_in_range(0..=3)?;
        Ok(Answer {
            id: self.id()?,
            requested_at: self.second()?,
            outcome: self.outcome()?,
            reason: if self.0.arbitrary()? { Some(self.reason()?) } else { None },
            unresolved: (0..n_unresolved).map(|_| self.service()).collect::<Result<_>>()?,
            decided_at: self.moment()?,
        })
    }

    fn parked(&mut self) -> Result<Parked> {
        let (mut key, parked_at) = (self.key()?, self.moment()?);
        let cause = if self.0.arbitrary()? {
            let error = if self.0.arbitrary()? { Some(self.text()?) } else { None };
            ParkedCause::Uncommitted { service: self.service()?, branch: self.branch()?, error }
        } else {
            let (id, service, data) = (&key.id, self.service()?, self.data()?);
            let data = data.as_str();
            let body = format!(
                r#"{{"id":"{id}","involved_services":["{service}"],"data":{data},"reply":"r"}}"#
            );
            let seconds = key.requested_at.as_millis() / 1000;
            // A field may stand twice in the data.
            let request = decode_request(body.as_bytes(), Some(seconds))
                .map_err(|_| arbitrary::Error::IncorrectFormat)?;
            key = request.key.clone();
            ParkedCause::Undecidable(request)
        };
        Ok(Parked { key, cause, parked_at })
    }

    fn settled(&mut self) -> Result<Settled> {
        Ok(Settled {
            key: self.key()?,
            service: self.service()?,
            settled_at: self.moment()?,
            worker: self.worker()?,
        })
    }
}
