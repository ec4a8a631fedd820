//! Random scenarios of a small whole system, against what anyone would expect without knowing how
//! it works: all services accept or nobody keeps anything, and no call is unnecessary.

use std::collections::BTreeSet;

use dtc::protocol::{message::Outcome, participant::Verdict};
use proptest::prelude::*;

use crate::{
    system::{Behaviour, Calls, Scenario, Service, System},
    words::BEGINNING,
};

/// `commit_retries` of a worker: how many calls follow the first that fails.
const COMMIT_RETRIES: u32 = 3;

fn behaviour() -> impl Strategy<Value = Behaviour> {
    let verdict = prop_oneof![
        8 => Just(Verdict::Prepared),
        1 => Just(Verdict::ReadOnly),
        1 => Just(Verdict::Refused(Some("card expired".into()))),
        1 => Just(Verdict::Failed("connection reset".into())),
    ];
    let failing_commits = prop_oneof![8 => Just(0_u32), 2 => 1..=6_u32];
    (verdict, failing_commits)
        .prop_map(|(verdict, failing_commits)| Behaviour { verdict, failing_commits })
}

fn services(transactions: usize) -> impl Strategy<Value = Service> {
    let behaviour = prop::collection::vec(behaviour(), transactions);
    (1..=3_u32, any::<bool>(), 1..=2_usize, behaviour).prop_map(
        |(max_concurrency, has_store, instances, behaviour)| Service {
            max_concurrency,
            has_store,
            // Instances without a common store are not of one service.
            instances: if has_store { instances } else { 1 },
            behaviour,
        },
    )
}

fn scenarios() -> impl Strategy<Value = Scenario> {
    (1..=10_usize, 1..=4_usize).prop_flat_map(|(transactions, known)| {
        // Sometimes a service is named that doesn't exist.
        let involved = prop_oneof![
            9 => prop::collection::btree_set(0..known, 1..=known),
            1 => prop::collection::btree_set(0..=known, 1..=known),
        ];
        let services = prop::collection::vec(services(transactions), known);
        let all = prop::collection::vec(involved, transactions);
        let doubled = prop::collection::vec(0..transactions, 0..3);
        (services, all, doubled, 1..=4_usize, any::<u64>()).prop_map(
            |(services, transactions, doubled, in_flight_max, order)| Scenario {
                services,
                transactions,
                doubled,
                in_flight_max,
                order,
            },
        )
    })
}

/// What the oracle knows of one transaction.
struct Expected<'a> {
    behaviours: Vec<(usize, Option<&'a Behaviour>)>,
}

impl<'a> Expected<'a> {
    fn of(scenario: &'a Scenario, transaction: usize) -> Self {
        let behaviour = |service: &usize| {
            let known = scenario.services.get(*service);
            (*service, known.map(|known| &known.behaviour[transaction]))
        };
        Self { behaviours: scenario.transactions[transaction].iter().map(behaviour).collect() }
    }

    fn outcome(&self) -> Outcome {
        let agrees = |(_, it): &(usize, Option<&Behaviour>)| {
            it.is_some_and(|it| matches!(it.verdict, Verdict::Prepared | Verdict::ReadOnly))
        };
        if self.behaviours.iter().all(agrees) { Outcome::Committed } else { Outcome::Aborted }
    }

    fn names_unknown(&self) -> bool {
        self.behaviours.iter().any(|(_, it)| it.is_none())
    }

    /// The services whose commit is parked.
    fn unresolved(&self) -> BTreeSet<usize> {
        let is_parked = |it: &Behaviour| {
            matches!(it.verdict, Verdict::Prepared) && it.failing_commits > COMMIT_RETRIES
        };
        let parked = self.behaviours.iter().filter(|(_, it)| it.is_some_and(is_parked));
        match self.outcome() {
            Outcome::Committed => parked.map(|(service, _)| *service).collect(),
            Outcome::Aborted => BTreeSet::new(),
        }
    }

    /// Whether the `calls` of a service with this behaviour are all necessary, and none is missing.
    fn allows(&self, behaviour: &Behaviour, instances: usize, calls: Calls) -> bool {
        let Calls { prepare, commit, abort } = calls;
        let commits = 1 + behaviour.failing_commits;
        match (self.outcome(), &behaviour.verdict) {
            _ if self.names_unknown() => calls == Calls::default(),
            // A parked commit may be applied by one instance and tried again by the other.
            (Outcome::Committed, Verdict::Prepared)
                if instances > 1 && commits > 1 + COMMIT_RETRIES =>
            {
                prepare == 1 && commit >= commits && abort == 0
            }
            (Outcome::Committed, Verdict::Prepared) => (prepare, commit, abort) == (1, commits, 0),
            (Outcome::Committed, _) => (prepare, commit, abort) == (1, 0, 0),
            // Whether it was called before another one refused depends on the order.
            (Outcome::Aborted, Verdict::Prepared | Verdict::Failed(_)) => {
                prepare <= 1 && commit == 0 && abort == prepare
            }
            (Outcome::Aborted, _) => prepare <= 1 && commit == 0 && abort == 0,
        }
    }
}

fn check(scenario: &Scenario) {
    let mut system = System::new(scenario.clone());
    system.run();
    let behaviours = scenario.services.iter().flat_map(|service| &service.behaviour);
    if behaviours.into_iter().all(|it| it.failing_commits == 0) {
        assert_eq!(system.now, BEGINNING, "nothing is left to a timer");
    }
    for transaction in 0..scenario.transactions.len() {
        let expected = Expected::of(scenario, transaction);
        let outcome = expected.outcome();
        assert_eq!(system.is_committed(transaction), outcome == Outcome::Committed);

        let answers = system.answers.iter().filter(|(of, _)| *of == transaction);
        let answers: Vec<_> = answers.map(|(_, answer)| answer).collect();
        let asked = 1 + scenario.doubled.iter().filter(|it| **it == transaction).count();
        assert_eq!(answers.len(), asked, "each request is answered once");
        assert!(answers.iter().all(|it| it.outcome == outcome), "and always alike");
        let unresolved: BTreeSet<_> =
            answers[0].unresolved.iter().map(ToString::to_string).collect();
        let parked = expected.unresolved();
        assert_eq!(unresolved, parked.iter().map(|it| format!("s{it}")).collect());

        for (service, behaviour) in &expected.behaviours {
            let calls = system.calls.get(&(transaction, *service)).copied().unwrap_or_default();
            let is_allowed = behaviour.map_or(calls == Calls::default(), |it| {
                let instances = scenario.services[*service].instances;
                expected.allows(it, instances, calls)
            });
            assert!(is_allowed, "t{transaction} s{service}: {calls:?} for {behaviour:?}");
            let times = |of: &[(usize, usize)]| {
                of.iter().filter(|it| **it == (transaction, *service)).count()
            };
            // A duplicate request may arrive when the first one's commit is parked, and park it
            // again.
            let most = if parked.contains(service) { asked } else { 0 };
            let least = most.min(1);
            assert!((least..=most).contains(&times(&system.parked)));
            assert_eq!(times(&system.settled), times(&system.parked), "what is parked is settled");
        }
        let involved = &scenario.transactions[transaction];
        let called = system.calls.keys().filter(|(of, _)| *of == transaction);
        assert!(called.into_iter().all(|(_, service)| involved.contains(service)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // More with PROPTEST_CASES.
        cases: ProptestConfig::default().cases.max(2000),
        // A finding becomes a golden trace, not a seed in a file.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_transaction_ends_as_its_services_vote_with_only_necessary_calls(
        scenario in scenarios()
    ) {
        check(&scenario);
    }
}

/// t2 held s0's slot while t0's commit failed repeatedly, and s0's other instance, which had found
/// it in the store, inquired: it got the outcome together with the holder.
#[test]
fn an_instance_that_only_finds_a_transaction_in_the_store_leaves_it_to_its_holder() {
    let service = |has_store, failing: [u32; 4]| {
        let behaviour = failing.map(|failing_commits| {
            let verdict = Verdict::Prepared;
            Behaviour { verdict, failing_commits }
        });
        let (max_concurrency, instances) = (1, 1 + usize::from(has_store));
        Service { max_concurrency, has_store, instances, behaviour: behaviour.to_vec() }
    };
    let transactions: [&[usize]; 4] = [&[1], &[1], &[0, 1], &[0]];
    let services =
        vec![service(true, [0, 0, 2, 0]), service(false, [6, 2, 0, 0]), service(false, [0; 4])];
    for order in 1..=1_000_u64 {
        check(&Scenario {
            services: services.clone(),
            transactions: transactions.iter().map(|it| it.iter().copied().collect()).collect(),
            doubled: Vec::new(),
            in_flight_max: 4,
            order: order.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        });
    }
}

/// t3 held s0 and needed s2; t4 waited for s0, and s2 was kept for it.
#[test]
fn a_slot_kept_for_a_waiter_does_not_exclude_a_transaction_that_holds_others() {
    let service = |max_concurrency| {
        let behaviour =
            (0..5).map(|_| Behaviour { verdict: Verdict::Prepared, failing_commits: 0 });
        let behaviour = behaviour.collect();
        Service { max_concurrency, has_store: false, instances: 1, behaviour }
    };
    let transactions: [&[usize]; 5] = [&[0, 1], &[0, 1], &[1], &[0, 1, 2], &[0, 2]];
    check(&Scenario {
        services: vec![service(1), service(2), service(1)],
        transactions: transactions.iter().map(|it| it.iter().copied().collect()).collect(),
        doubled: std::iter::empty().collect(),
        in_flight_max: 3,
        order: 17_494_182_284_814_593_180,
    });
}
