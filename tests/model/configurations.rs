//! The configurations that are searched: each is small enough to be searched completely, and is
//! about one kind of fault.

use dtc::protocol::message::{AnswerAt, Request};

use crate::{
    properties::Milestone,
    scenario::{Answer, Faults, Scenario, Service, request, request_at, with_other_content},
};

const NONE: Faults = Faults::NONE;

fn service(name: &'static str) -> Service {
    Service::named(name)
}

/// A worker freezes, its request goes to the other, and it wakes late.
pub fn frozen_worker() -> Scenario {
    Scenario {
        faults: Faults { redeliveries: 1, worker_timeouts: 1, ..NONE },
        reaches: &[
            Milestone::Commits,
            Milestone::Aborts,
            Milestone::TakesOver,
            Milestone::SplitDecision,
        ],
        ..Scenario::new(
            "a frozen worker wakes late",
            vec![service("a"), service("b")],
            vec![request("t", &["a", "b"])],
        )
    }
}

/// The same where each worker asks both services at once.
pub fn frozen_worker_with_plenty() -> Scenario {
    Scenario {
        name: "a frozen worker wakes late, prepares in parallel",
        plenty: true,
        ..frozen_worker()
    }
}

/// A worker dies; its successor, or the other worker, takes over.
pub fn crash() -> Scenario {
    Scenario {
        faults: Faults { crashes: 1, worker_timeouts: 1, duplicates: 1, ..NONE },
        slow_confirms: true,
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::TakesOver],
        ..Scenario::new("a worker crashes", vec![service("a")], vec![request("t", &["a"])])
    }
}

/// The same with two services, one of which may have been asked when the worker dies.
pub fn crash_two_services() -> Scenario {
    Scenario {
        faults: Faults { crashes: 1, worker_timeouts: 1, ..NONE },
        slow_confirms: true,
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::TakesOver],
        ..Scenario::new(
            "a worker crashes",
            vec![service("a"), service("b")],
            vec![request("t", &["a", "b"])],
        )
    }
}

/// The same request was published twice.
pub fn duplicate_request() -> Scenario {
    Scenario {
        faults: Faults { worker_timeouts: 1, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::SplitDecision],
        ..Scenario::new(
            "a request twice",
            vec![service("a").with_store(), service("b").with_store()],
            vec![request("t", &["a", "b"]), request("t", &["a", "b"])],
        )
    }
}

/// The second worker attaches the journal at its end, and must look back for what it is asked.
pub fn late_reader() -> Scenario {
    Scenario {
        faults: Faults { redeliveries: 1, worker_timeouts: 1, ..NONE },
        second_is_late: true,
        attach_at_end: true,
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::TakesOver],
        ..Scenario::new("a late reader", vec![service("a")], vec![request("t", &["a"])])
    }
}

/// The second worker gets an inquiry about a transaction that began before its view.
pub fn late_inquiry() -> Scenario {
    Scenario {
        name: "a late reader is asked",
        faults: Faults { worker_timeouts: 1, member_timeouts: 1, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::InquiryDecides],
        ..late_reader()
    }
}

/// The second worker looks back and finds that the beginning was dropped: it doesn't guess.
pub fn truncated_journal() -> Scenario {
    Scenario {
        faults: Faults { redeliveries: 1, worker_timeouts: 1, truncations: 1, ..NONE },
        second_is_late: true,
        attach_at_end: true,
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::ParksTransaction],
        ..Scenario::new("a truncated journal", vec![service("a")], vec![request("t", &["a"])])
    }
}

/// The worker remembers too little of the journal for two transactions.
pub fn short_memory() -> Scenario {
    Scenario {
        faults: Faults { redeliveries: 1, worker_timeouts: 1, ..NONE },
        records_max: 1,
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::TakesOver],
        ..Scenario::new(
            "a short memory",
            vec![service("a")],
            vec![request("t", &["a"]), request("u", &["a"])],
        )
    }
}

/// Instances restart and have forgotten everything that is not in their store.
pub fn forgetful_service() -> Scenario {
    Scenario {
        faults: Faults { restarts: 1, duplicates: 1, worker_timeouts: 1, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::UndoesSecondBranch],
        ..Scenario::new(
            "a service forgets",
            vec![service("a").with_store()],
            vec![request("t", &["a"])],
        )
    }
}

/// Two instances of one service prepare the same transaction.
pub fn two_instances() -> Scenario {
    Scenario {
        faults: Faults { duplicates: 1, worker_timeouts: 1, member_timeouts: 1, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::UndoesSecondBranch],
        ..Scenario::new(
            "two instances",
            vec![service("a").with_store().instances(2)],
            vec![request("t", &["a"])],
        )
    }
}

/// The service's code and its store are slow, and instances die meanwhile.
pub fn slow_services() -> Scenario {
    Scenario {
        faults: Faults { duplicates: 1, worker_timeouts: 1, restarts: 1, ..NONE },
        slow_services: true,
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::UndoesSecondBranch],
        ..Scenario::new(
            "slow code and stores",
            vec![service("a").with_store().instances(2)],
            vec![request("t", &["a"])],
        )
    }
}

/// The service's code fails to commit, until the commit is parked; later it succeeds.
pub fn commit_failures() -> Scenario {
    Scenario {
        faults: Faults { commit_failures: 2, worker_timeouts: 2, restarts: 1, ..NONE },
        commit_retries: 0,
        reaches: &[Milestone::Commits, Milestone::ParksCommit, Milestone::Settles],
        ..Scenario::new(
            "commits fail",
            vec![service("a").with_store(), service("b").with_store()],
            vec![request("t", &["a", "b"])],
        )
    }
}

/// The service's code gives every possible answer; some votes arrive only as inquiries.
pub fn votes() -> Scenario {
    Scenario {
        faults: Faults { redeliveries: 1, member_timeouts: 1, worker_timeouts: 0, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Aborts],
        ..Scenario::new(
            "every answer",
            vec![
                service("a").answering(&[
                    Answer::Prepared,
                    Answer::ReadOnly,
                    Answer::Refused,
                    Answer::FailedEmpty,
                    Answer::FailedHolding,
                ]),
                service("b"),
            ],
            vec![request("t", &["a", "b"])],
        )
    }
}

/// Prepares are returned, even those that an instance has held; instances lose their connection.
pub fn no_slot() -> Scenario {
    Scenario {
        faults: Faults { returns: 2, member_disconnects: 1, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Aborts],
        ..Scenario::new(
            "no slot",
            vec![service("a").with_store(), service("b")],
            vec![request("t", &["a", "b"]), request("u", &["a"])],
        )
    }
}

/// A worker dies that has answered, or not, before the services have committed.
pub fn early_answer() -> Scenario {
    let request = Request { answer_at: AnswerAt::Decided, ..request("t", &["a", "b"]) };
    Scenario {
        faults: Faults { crashes: 1, ..NONE },
        slow_confirms: true,
        reaches: &[Milestone::Commits, Milestone::TakesOver],
        ..Scenario::new("a result at the decision", vec![service("a"), service("b")], vec![request])
    }
}

/// Two requests came in one message, and its worker dies.
pub fn shared_message() -> Scenario {
    Scenario {
        faults: Faults { crashes: 1, ..NONE },
        one_message: true,
        slow_confirms: true,
        reaches: &[Milestone::Commits, Milestone::TakesOver],
        ..Scenario::new(
            "two requests in a message",
            vec![service("a").with_store()],
            vec![request("t", &["a"]), request("u", &["a"])],
        )
    }
}

/// Only the instances that hold a prepared transaction ask for its outcome.
pub fn inquiries() -> Scenario {
    Scenario {
        faults: Faults { worker_timeouts: 1, member_timeouts: 2, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::InquiryDecides],
        ..Scenario::new(
            "inquiries",
            vec![service("a"), service("b")],
            vec![request("t", &["a", "b"])],
        )
    }
}

/// Three services, and a worker that freezes.
pub fn three_services() -> Scenario {
    Scenario {
        faults: Faults { redeliveries: 1, ..NONE },
        reaches: &[Milestone::Commits, Milestone::TakesOver],
        ..Scenario::new(
            "three services",
            vec![service("a"), service("b"), service("c")],
            vec![request("t", &["a", "b", "c"])],
        )
    }
}

/// A producer repeats a request under the same id with another timestamp.
pub fn retry_under_a_new_timestamp() -> Scenario {
    Scenario {
        faults: Faults { redeliveries: 1, worker_timeouts: 1, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Aborts],
        ..Scenario::new(
            "a retry under a new timestamp",
            vec![service("a")],
            vec![request_at("t", 50, &["a"]), request_at("t", 51, &["a"])],
        )
    }
}

/// The same key stands for two requests: one of them is rejected.
pub fn other_content() -> Scenario {
    Scenario {
        faults: Faults { worker_timeouts: 1, member_timeouts: 1, ..NONE },
        reaches: &[Milestone::Commits, Milestone::Rejects],
        ..Scenario::new(
            "the same id with other content",
            vec![service("a").with_store(), service("b")],
            vec![request("t", &["a", "b"]), with_other_content(request("t", &["a"]))],
        )
    }
}

/// A worker loses its connection and the messages on it; a result is not confirmed.
pub fn worker_disconnects() -> Scenario {
    Scenario {
        faults: Faults { worker_disconnects: 1, lost_confirms: 1, worker_timeouts: 1, ..NONE },
        slow_confirms: true,
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::TakesOver],
        ..Scenario::new(
            "a worker loses its connection",
            vec![service("a"), service("b")],
            vec![request("t", &["a", "b"])],
        )
    }
}

/// A request that was delivered too often is aborted, whatever its first worker does.
pub fn poison_request() -> Scenario {
    Scenario {
        faults: Faults { redeliveries: 1, member_timeouts: 1, ..NONE },
        deliveries_max: 1,
        reaches: &[Milestone::Commits, Milestone::Aborts, Milestone::SplitDecision],
        ..Scenario::new(
            "a request delivered too often",
            vec![service("a"), service("b")],
            vec![request("t", &["a", "b"])],
        )
    }
}

/// The same key with other content, and a worker that dies: the votes for the one request reach the
/// worker that has the other.
pub fn other_content_after_crash() -> Scenario {
    Scenario {
        name: "other content, and a crash",
        faults: Faults { crashes: 1, ..NONE },
        ..other_content()
    }
}
