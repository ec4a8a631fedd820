//! Handles what is learned of services: whether they exist, can be reached and have instances, and how many
//! slots are free. Then lets the transactions continue that wait for them.

use std::time::Duration;

use crate::protocol::{
    coordinator::{Anomaly, CoordinatorContext, Effect, SharedState, Work, admission::ServiceLoad},
    ids::{InstanceId, ServiceName, StoreId, TransactionKey},
};

impl Work {
    pub(super) fn service_found(&mut self, service: &ServiceName, cx: &mut CoordinatorContext<'_>) {
        let Some(load) = cx.shared.loads.get_mut(service) else { return };
        if load.found() {
            cx.effects.push(Effect::Report(Anomaly::ServiceAvailable(service.clone())));
        }
        if load.served() {
            cx.effects.push(Effect::Report(Anomaly::ServiceServed(service.clone())));
        }
        self.retry_waiters(service, cx);
    }

    /// The service exists, and has no instance. From now on transactions wait for it with a deadline, and
    /// only a limited number of them.
    pub(super) fn service_unserved(
        &mut self,
        service: &ServiceName,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(load) = cx.shared.loads.get_mut(service) else { return };
        if load.is_found() && load.is_unserved() {
            return;
        }
        if load.found() {
            cx.effects.push(Effect::Report(Anomaly::ServiceAvailable(service.clone())));
        }
        if load.unserved() {
            cx.effects.push(Effect::Report(Anomaly::ServiceUnserved(service.clone())));
        }
        self.retry_waiters(service, cx);
    }

    /// The state of the service has changed: each waiter tries again.
    fn retry_waiters(&mut self, service: &ServiceName, cx: &mut CoordinatorContext<'_>) {
        let Some(load) = cx.shared.loads.get_mut(service) else { return };
        let waiters: Vec<_> = load.dequeue_all().collect();
        for key in waiters {
            self.with(&key, cx, |it, cx| it.dequeued(service, cx));
        }
    }

    pub(super) fn service_missing(
        &mut self,
        service: &ServiceName,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(mut load) = cx.shared.loads.remove(service) else { return };
        for key in load.dequeue_all() {
            self.with(&key, cx, |it, cx| it.service_missing(service, cx));
        }
    }

    /// The service can't be reached. `refused`: its queue has refused a prepare. From now on transactions
    /// wait for it with a deadline, and only a limited number of them.
    pub(super) fn service_unavailable(
        &mut self,
        service: &ServiceName,
        refused: bool,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let SharedState { loads, settings, .. } = &mut *cx.shared;
        let Some(load) = loads.get_mut(service) else { return };
        if load.is_found() {
            let after = if refused { load.refused(settings.backoff_first) } else { Duration::ZERO };
            cx.effects.push(Effect::FindService { service: service.clone(), after });
        }
        if !refused {
            load.unreached();
        }
        if load.is_unavailable() {
            return;
        }
        if load.unavailable() {
            cx.effects.push(Effect::Report(Anomaly::ServiceUnavailable(service.clone())));
        }
        self.retry_waiters(service, cx);
    }

    /// The service was found before, and is gone.
    pub(super) fn prepare_unroutable(
        &mut self,
        key: &TransactionKey,
        service: &ServiceName,
        cx: &mut CoordinatorContext<'_>,
    ) {
        self.with(key, cx, |it, cx| it.service_missing(service, cx));
        // If it is not found, a search is under way already.
        if let Some(load) = cx.shared.loads.get_mut(service).filter(|load| load.is_found()) {
            load.lost();
            let service = service.clone();
            cx.effects.push(Effect::FindService { service, after: Duration::ZERO });
        }
    }

    /// Lets waiters continue where a slot may have become free.
    pub(super) fn serve_waiters(&mut self, cx: &mut CoordinatorContext<'_>) {
        if cx.shared.was_at_capacity && !cx.is_at_capacity() {
            cx.shared.was_at_capacity = false;
            let waiting = cx.shared.loads.iter().filter(|(_, load)| load.has_waiters());
            let services: Vec<_> = waiting.map(|(service, _)| service.clone()).collect();
            cx.shared.dirty_services.extend(services);
        }
        while let Some(service) = cx.shared.dirty_services.pop_first() {
            while let Some(key) = self.next_waiter(&service, cx) {
                self.with(&key, cx, |it, cx| it.dequeued(&service, cx));
            }
        }
    }

    fn next_waiter(
        &mut self,
        service: &ServiceName,
        cx: &mut CoordinatorContext<'_>,
    ) -> Option<TransactionKey> {
        let may_begin = !cx.is_at_capacity();
        let SharedState { loads, deadlines, was_at_capacity, .. } = &mut *cx.shared;
        let load = loads.get_mut(service).filter(|load| load.is_found())?;
        if !load.admits(cx.now, load.has_begun_waiters()) {
            if let (Some(at), Some(first)) = (load.to_be_tried_at(cx.now), load.first_waiter())
                && let Some(it) = self.transactions.get_mut(first)
            {
                it.wake_by(at, deadlines);
            }
            return None;
        }
        let next = load.dequeue(may_begin);
        if next.is_none() && load.has_waiters() {
            *was_at_capacity = true;
        }
        next
    }
}

impl CoordinatorContext<'_> {
    /// An instance has reported its free slots and its store.
    pub(super) fn reported(
        &mut self,
        service: &ServiceName,
        instance: &InstanceId,
        free: u32,
        store: Option<&StoreId>,
    ) {
        let SharedState { loads, dirty_services, .. } = &mut *self.shared;
        let Some(load) = loads.get_mut(service) else { return };
        load.reported(self.now, instance, free);
        if load.has_waiters() {
            dirty_services.insert(service.clone());
        }
        // All instances of a service should share one store.
        if let Some(store) = store
            && let Some(before) = load.named_store(self.now, instance, store)
        {
            let (service, now) = (service.clone(), (instance.clone(), store.clone()));
            self.effects.push(Effect::Report(Anomaly::StoresDiffer { service, before, now }));
        }
    }

    /// The message that came with the latest report is handled: now the report can be used.
    pub(super) fn learn(&mut self, service: &ServiceName) {
        if let Some(load) = self.shared.loads.get_mut(service) {
            load.learn();
        }
    }

    pub(super) fn is_at_capacity(&self) -> bool {
        self.shared.active >= self.shared.settings.in_flight_max
    }

    /// Whether the limit of transactions is reached that wait for services that can't be reached or have no
    /// instance. With more of them, the worker would soon take no requests for other services.
    pub(super) fn is_full_of_stranded(&self) -> bool {
        let out_of_reach = self.shared.loads.values().filter(|load| load.is_out_of_reach());
        let waiters: usize = out_of_reach.map(ServiceLoad::waiters).sum();
        waiters >= (self.shared.settings.waiting_max / 2).max(1)
    }

    /// The load of `service`, if it is known.
    pub(super) fn known_load(&mut self, service: &ServiceName) -> Option<&mut ServiceLoad> {
        self.shared.loads.get_mut(service)
    }

    /// A message to `service` was not answered in time: perhaps it has no instance.
    pub(super) fn check(&mut self, service: &ServiceName) {
        let is_of_use =
            |load: &&ServiceLoad| load.is_found() && !load.is_unserved() && !load.is_own();
        if self.shared.loads.get(service).filter(is_of_use).is_some() {
            self.effects.push(Effect::CheckService(service.clone()));
        }
    }

    /// The load of `service`. If the service is unknown, a search for it begins.
    pub(super) fn load(&mut self, service: &ServiceName) -> &mut ServiceLoad {
        let SharedState { loads, settings, .. } = &mut *self.shared;
        if loads.len() >= settings.services_max && !loads.contains_key(service) {
            let now = self.now;
            loads.retain(|_, load| !load.is_stale(now));
        }
        loads.entry(service.clone()).or_insert_with(|| {
            let (service, after) = (service.clone(), Duration::ZERO);
            let own = settings.own_services.get(&service);
            self.effects.push(Effect::FindService { service, after });
            ServiceLoad::new(own)
        })
    }

    /// Changes the load of `service` in a way that may let waiters continue.
    pub(super) fn relieve(&mut self, service: &ServiceName, tell: impl FnOnce(&mut ServiceLoad)) {
        let Some(load) = self.shared.loads.get_mut(service) else { return };
        tell(load);
        if load.has_waiters() {
            self.shared.dirty_services.insert(service.clone());
        }
    }
}
