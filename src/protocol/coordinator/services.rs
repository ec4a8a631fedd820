//! What happens to the services that transactions need: they are found, missing, out of reach or
//! unserved, and report free slots; and who may go on then.

use std::time::Duration;

use crate::protocol::{
    coordinator::{Anomaly, Context, Effect, Shared, Work, admission::Flow},
    ids::{InstanceId, ServiceName, StoreId, TransactionKey},
};

impl Work {
    pub(super) fn service_found(&mut self, service: &ServiceName, cx: &mut Context<'_>) {
        let Some(flow) = cx.shared.flows.get_mut(service) else { return };
        if flow.found() {
            cx.effects.push(Effect::Report(Anomaly::ServiceAvailable(service.clone())));
        }
        if flow.served() {
            cx.effects.push(Effect::Report(Anomaly::ServiceServed(service.clone())));
        }
        self.try_all_anew(service, cx);
    }

    /// The service exists, and nobody serves it. Who waits for it does so from now on with a
    /// deadline, and only so many.
    pub(super) fn service_unserved(&mut self, service: &ServiceName, cx: &mut Context<'_>) {
        let Some(flow) = cx.shared.flows.get_mut(service) else { return };
        if flow.is_found() && flow.is_unserved() {
            return;
        }
        if flow.found() {
            cx.effects.push(Effect::Report(Anomaly::ServiceAvailable(service.clone())));
        }
        if flow.unserved() {
            cx.effects.push(Effect::Report(Anomaly::ServiceUnserved(service.clone())));
        }
        self.try_all_anew(service, cx);
    }

    /// What those who wait for the service go by is another now.
    fn try_all_anew(&mut self, service: &ServiceName, cx: &mut Context<'_>) {
        let Some(flow) = cx.shared.flows.get_mut(service) else { return };
        let waiters: Vec<_> = flow.dequeue_all().collect();
        for key in waiters {
            self.with(&key, cx, |it, cx| it.dequeued(service, cx));
        }
    }

    pub(super) fn service_missing(&mut self, service: &ServiceName, cx: &mut Context<'_>) {
        let Some(mut flow) = cx.shared.flows.remove(service) else { return };
        for key in flow.dequeue_all() {
            self.with(&key, cx, |it, cx| it.service_missing(service, cx));
        }
    }

    /// The service can't be reached; `refused`: its queue has refused a prepare. Who waits for it
    /// does so from now on with a deadline, and only so many.
    pub(super) fn service_unavailable(
        &mut self,
        service: &ServiceName,
        refused: bool,
        cx: &mut Context<'_>,
    ) {
        let Shared { flows, settings, .. } = &mut *cx.shared;
        let Some(flow) = flows.get_mut(service) else { return };
        if flow.is_found() {
            let after = if refused { flow.refused(settings.backoff_first) } else { Duration::ZERO };
            cx.effects.push(Effect::FindService { service: service.clone(), after });
        }
        if !refused {
            flow.unreached();
        }
        if flow.is_unavailable() {
            return;
        }
        if flow.unavailable() {
            cx.effects.push(Effect::Report(Anomaly::ServiceUnavailable(service.clone())));
        }
        self.try_all_anew(service, cx);
    }

    /// The service is gone since it was found.
    pub(super) fn prepare_unroutable(
        &mut self,
        key: &TransactionKey,
        service: &ServiceName,
        cx: &mut Context<'_>,
    ) {
        self.with(key, cx, |it, cx| it.service_missing(service, cx));
        // One that is not found is being looked for already.
        if let Some(flow) = cx.shared.flows.get_mut(service).filter(|flow| flow.is_found()) {
            flow.lost();
            let service = service.clone();
            cx.effects.push(Effect::FindService { service, after: Duration::ZERO });
        }
    }

    /// Lets those go on who waited for what has become free.
    pub(super) fn serve_waiters(&mut self, cx: &mut Context<'_>) {
        if cx.shared.gated && !cx.is_at_capacity() {
            cx.shared.gated = false;
            let waiting = cx.shared.flows.iter().filter(|(_, flow)| flow.has_waiters());
            let services: Vec<_> = waiting.map(|(service, _)| service.clone()).collect();
            cx.shared.touched.extend(services);
        }
        while let Some(service) = cx.shared.touched.pop_first() {
            while let Some(key) = self.next_waiter(&service, cx) {
                self.with(&key, cx, |it, cx| it.dequeued(&service, cx));
            }
        }
    }

    fn next_waiter(
        &mut self,
        service: &ServiceName,
        cx: &mut Context<'_>,
    ) -> Option<TransactionKey> {
        let may_begin = !cx.is_at_capacity();
        let Shared { flows, deadlines, gated, .. } = &mut *cx.shared;
        let flow = flows.get_mut(service).filter(|flow| flow.is_found())?;
        if !flow.admits(cx.now, flow.has_begun_waiters()) {
            if let (Some(at), Some(first)) = (flow.to_be_tried_at(cx.now), flow.first_waiter())
                && let Some(it) = self.transactions.get_mut(first)
            {
                it.wake_by(at, deadlines);
            }
            return None;
        }
        let next = flow.dequeue(may_begin);
        if next.is_none() && flow.has_waiters() {
            *gated = true;
        }
        next
    }
}

impl Context<'_> {
    /// An instance has reported its free slots, and which store it has.
    pub(super) fn reported(
        &mut self,
        service: &ServiceName,
        instance: &InstanceId,
        free: u32,
        store: Option<&StoreId>,
    ) {
        let Shared { flows, touched, .. } = &mut *self.shared;
        let Some(flow) = flows.get_mut(service) else { return };
        flow.reported(self.now, instance, free);
        if flow.has_waiters() {
            touched.insert(service.clone());
        }
        // All instances of a service should share one store.
        if let Some(store) = store
            && let Some(before) = flow.named_store(self.now, instance, store)
        {
            let (service, now) = (service.clone(), (instance.clone(), store.clone()));
            self.effects.push(Effect::Report(Anomaly::StoresDiffer { service, before, now }));
        }
    }

    /// What the service reported with what was just handled.
    pub(super) fn learn(&mut self, service: &ServiceName) {
        if let Some(flow) = self.shared.flows.get_mut(service) {
            flow.learn();
        }
    }

    pub(super) fn is_at_capacity(&self) -> bool {
        self.shared.active >= self.shared.settings.in_flight_max
    }

    /// Whether as many wait for services that can't be reached, or that nobody serves, as may: with
    /// more, requests that need none of these would soon not be taken in.
    pub(super) fn is_full_of_stranded(&self) -> bool {
        let out_of_reach = self.shared.flows.values().filter(|flow| flow.is_out_of_reach());
        let waiters: usize = out_of_reach.map(Flow::waiters).sum();
        waiters >= (self.shared.settings.waiting_max / 2).max(1)
    }

    /// What is known of `service`, if it is remembered.
    pub(super) fn known_flow(&mut self, service: &ServiceName) -> Option<&mut Flow> {
        self.shared.flows.get_mut(service)
    }

    /// Something was sent to `service` and not answered in time: perhaps nobody serves it.
    pub(super) fn check(&mut self, service: &ServiceName) {
        let is_of_use = |flow: &&Flow| flow.is_found() && !flow.is_unserved() && !flow.is_own();
        if self.shared.flows.get(service).filter(is_of_use).is_some() {
            self.effects.push(Effect::CheckService(service.clone()));
        }
    }

    /// What is known of `service`; it is looked for if it is new.
    pub(super) fn flow(&mut self, service: &ServiceName) -> &mut Flow {
        let Shared { flows, settings, .. } = &mut *self.shared;
        if flows.len() >= settings.services_max && !flows.contains_key(service) {
            let now = self.now;
            flows.retain(|_, flow| !flow.is_stale(now));
        }
        flows.entry(service.clone()).or_insert_with(|| {
            let (service, after) = (service.clone(), Duration::ZERO);
            let own = settings.own_services.get(&service);
            self.effects.push(Effect::FindService { service, after });
            Flow::new(own)
        })
    }

    /// Tells the flow of `service` something that may let waiters go on.
    pub(super) fn relieve(&mut self, service: &ServiceName, tell: impl FnOnce(&mut Flow)) {
        let Some(flow) = self.shared.flows.get_mut(service) else { return };
        tell(flow);
        if flow.has_waiters() {
            self.shared.touched.insert(service.clone());
        }
    }
}
