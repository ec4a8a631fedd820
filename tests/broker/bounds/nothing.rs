//! The base of the other tests here: a system works behind the proxy, and recovers when its
//! connections end.

use crate::{
    proxy::{Action, Frames, Scope, Side},
    stand::{BOTH, ProxiedSystem},
};

#[test]
fn without_faults_transactions_commit_and_the_proxy_counts_each_frame_once() {
    let stand = ProxiedSystem::new();
    let (site, worker) = (&stand.site, "dtc worker w1 (publish)");
    let counted = |frames| site.proxy.rule(frames, Scope::Existing, Action::Count);
    let name = |rest| site.name(rest);
    let once = [
        counted(Frames::publishes().on(worker).about(&name("journal"))),
        counted(Frames::confirms().on(worker).about(&name("journal"))),
        counted(Frames::publishes().on(worker).about(&name("results/"))),
        counted(Frames::publishes().on("dtc submit").about(&name("requests/"))),
        counted(Frames::deliveries().on("dtc worker w1 (consume)").about(&name("journal"))),
        counted(Frames::deliveries().on("dtc worker w1 (consume)").about(&name("requests"))),
        counted(Frames::deliveries().on("dtc service stock *(consume)").about(&name("prepare."))),
        // Not the probes of an instance whose queue is quiet.
        counted(Frames::deliveries().on("dtc service stock *(consume)").about(&name("finish/"))),
        counted(Frames::acks().on("dtc service stock").about(&name("prepare.stock"))),
        counted(Frames::deliveries().on("dtc submit (results)").about(&name("results."))),
    ];
    let none = counted(Frames::publishes().on(worker).about(&name("rejected")));
    stand.commits(&BOTH);
    once.iter().for_each(|tap| tap.wait_for(1));
    let counts: Vec<_> = once.iter().map(crate::proxy::ActiveRule::count).collect();
    assert_eq!((counts, none.count()), (vec![1; once.len()], 0));
}

#[test]
fn a_system_recovers_when_all_its_connections_end() {
    let stand = ProxiedSystem::new();
    let mark = stand.marked();
    let proxy = &stand.site.proxy;
    let new = proxy.rule(Frames::all(Side::Client), Scope::All, Action::Count);
    proxy.cut("");
    stand.commits_again(&mark, &new, &BOTH);
}
