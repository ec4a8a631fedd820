//! The work over one link to the broker: handles all inputs that are ready, and then writes all that
//! follows from them.

use std::{
    collections::{BTreeMap, VecDeque},
    future::poll_fn,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use lapin::{
    message::Delivery as Message,
    types::{FieldTable, ShortString},
};
use tokio::time::{Instant, timeout};

mod clocks;
mod error;
mod rejections;
mod requests;

pub(super) use self::error::SessionError;

use self::{clocks::fits_again, error::opening};
use crate::{
    clock::ClockStepDetector,
    protocol::{
        coordinator::{Effect, Event},
        ids::{ReplyToken, ServiceName, TransactionKey},
        message::{Delivery, Destination},
        request_messages::MessageNumber,
    },
    transport::amqp::{
        connection_pair::{ConnectionEvent, ConnectionMonitor, ConnectionPair},
        consumer::{ConsumerMode, QueueConsumer},
        exclusive_queue::{ExchangeBinding, ExclusiveQueue},
        names,
        queue_lookup::QueueLookup,
    },
    wire::message::Settled,
    worker::{
        Settings,
        anomalies::{report, tell_packs_unusable, tell_parked},
        appender::Appender,
        clocks::ClockComparison,
        follower::{FollowError, Follower, JournalEvent, read_event},
        inbound,
        journal::{HistoryItem, Journal, ReadError, Record},
        outbox::{OnConfirm, Outbox, OutboxEvent, Unacked},
        packer::Packer,
        packs::{PackEvent, PackedJournal},
        request_consumers::RequestConsumers,
        saturation::{Saturation, Wanted},
        searches::Searches,
        state::WorkerState,
        suspects::{Suspect, Suspects},
    },
};

/// How many inputs to handle, at most, before the messages that follow from them are written.
const BATCH_MAX: usize = 1024;

/// How many unacknowledged replies the broker delivers.
const REPLIES_PREFETCH: u16 = 2000;

/// The same for inquiries, whose queue all workers share.
const INQUIRIES_PREFETCH: u16 = 200;

/// How long to wait for the last confirms when the worker stops.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// How a worker has stopped.
#[derive(Debug)]
pub(super) enum StopReason {
    /// It has finished all transactions that it had begun.
    Drained,
    /// Its time to drain was over before that.
    DrainTimedOut,
    /// It could finish none: the journal was gone.
    WithoutJournal,
}

/// An input of the session.
enum Input {
    Journal(JournalEvent),
    Appended,
    Outbox(OutboxEvent),
    Reply(Message),
    Inquiry(Message),
    Requests(MessageNumber, Message),
    Service(Event),
    Link(ConnectionEvent),
    ClocksCompared(Option<ClockComparison>),
    Packs(PackEvent),
}

/// How long the journal's consumer may be lost before the worker is not ready.
const READ_AGAIN_SOON: Duration = Duration::from_secs(2);

/// How many kinds of inputs there are.
const TURNS: usize = 9;

/// The work over one link.
pub(super) struct Session<'a> {
    settings: &'a Settings,
    state: &'a mut WorkerState,
    link: ConnectionPair,
    watch: ConnectionMonitor,
    follower: Follower,
    appender: Appender,
    packer: Packer,
    outbox: Outbox,
    replies: ExclusiveQueue,
    inquiries: QueueConsumer,
    /// How many workers there are, as the coordinator was last told.
    workers: Option<u32>,
    requests: RequestConsumers,
    searches: Searches,
    saturation: Saturation,
    suspects: Suspects,
    /// What is not acknowledged yet.
    unsettled: Unsettled,
    /// Requests from the future, until it is known whether it is this worker's clock that is off.
    doubtful: Vec<(MessageNumber, Message)>,
    /// Requests for which the coordinator had no room when their message came. Until it has taken them, no
    /// further message is taken.
    backlog: VecDeque<Suspect>,
    comparing: Option<BoxFuture<'static, Option<ClockComparison>>>,
    steps: ClockStepDetector,
    effects: Vec<Effect>,
    /// Which kind of input to poll first.
    turn: usize,
    /// Set when the worker was asked to stop: how long it may finish transactions.
    drain_until: Option<Instant>,
}

/// What the session keeps about unacknowledged deliveries.
#[derive(Debug, Default)]
struct Unsettled {
    /// The reply token of each request.
    reply_of: BTreeMap<Delivery, Option<ReplyToken>>,
    /// How many records must be safe before a message of the queue of inquiries is acknowledged.
    inquiries: BTreeMap<u64, u32>,
}

impl<'a> Session<'a> {
    /// Reads the journal to its end, and opens all channels and consumers.
    pub(super) async fn open(
        settings: &'a Settings,
        state: &'a mut WorkerState,
        link: ConnectionPair,
        replies: ExclusiveQueue,
    ) -> Result<Self, SessionError> {
        let watch = link.watch(settings.broker.clone());
        let names = &settings.names;
        let journal = Journal {
            queue: names.journal(),
            consuming: link.consuming.clone(),
            publishing: link.publishing.clone(),
            begin_max: state.begin_max,
        };
        if state.clocks.is_off() && !fits_again(&journal, settings, state).await? {
            tokio::spawn(link.close());
            return Err(SessionError::ClockStillOff);
        }
        let steps = ClockStepDetector::of(&state.clock);
        let packed = PackedJournal::of(&link, names, &settings.broker);
        let opening_follower = Follower::open(journal.clone(), packed.as_ref(), settings, state);
        let follower = match opening_follower.await {
            Err(error @ FollowError::Read(ReadError::Silent)) => {
                // Perhaps the window begins in the future, by the broker's clock.
                let margin = settings.coordinator.clock_margin;
                let standing = journal.compare(state.clock, margin).await.ok();
                let now = state.clock.read();
                state.clocks.broker(now, standing);
                let off = state.clocks.journal_is_silent(now);
                tokio::spawn(link.close());
                return Err(off.map_or_else(|| error.into(), SessionError::ClockOff));
            }
            opened => opened?,
        };
        if state.clocks.is_in_doubt(state.clock.read()) {
            let margin = settings.coordinator.clock_margin;
            let standing = follower.compare(state.clock, margin).await;
            let now = state.clock.read();
            state.clocks.broker(now, standing);
            if let Some(off) = state.clocks.verdict(now) {
                tokio::spawn(link.close());
                return Err(SessionError::ClockOff(off));
            }
        }
        let channels = opening("channels to publish on");
        let appender = Appender::open(&link.publishing, names).await.map_err(channels)?;
        state.namesakes.begin(appender.link());
        let outbox = Outbox::open(&link.publishing, names.clone(), settings.worker().clone());
        let outbox = outbox.await.map_err(opening("channels to publish on"))?;
        let inquiries = QueueConsumer::open(
            &link.consuming,
            names.inquiries(),
            INQUIRIES_PREFETCH,
            FieldTable::default(),
        );
        let inquiries = inquiries.await.map_err(opening("the queue of inquiries"))?;
        // Each worker consumes this queue once, so its consumers are the workers.
        let inquiries = inquiries
            .with_liveness_probe(&link.consuming, ConsumerMode::Competing)
            .checked_at_once();
        let mut requests = RequestConsumers::new(names.requests());
        let opening_requests = requests.open(&link.consuming, settings.requests_prefetch());
        opening_requests.await.map_err(opening("the queue of requests"))?;
        let searches = Searches::new(names.clone(), QueueLookup::new(settings.broker.clone()));
        Ok(Self {
            settings,
            state,
            link,
            watch,
            follower,
            appender,
            packer: Packer::new(packed),
            outbox,
            replies,
            inquiries,
            workers: None,
            requests,
            searches,
            saturation: Saturation::default(),
            suspects: Suspects::new(settings.coordinator.deliveries_max),
            unsettled: Unsettled::default(),
            doubtful: Vec::new(),
            backlog: VecDeque::new(),
            comparing: None,
            steps,
            effects: Vec::new(),
            turn: 0,
            drain_until: None,
        })
    }

    /// Works until the link is lost, or until `stop` has completed and the worker has drained.
    pub(super) async fn run(
        mut self,
        stop: impl Future<Output = ()> + Unpin,
    ) -> Result<StopReason, SessionError> {
        match self.work(stop).await {
            Ok(end) => Ok(self.close(end).await),
            Err(error) => {
                // The broker gives this worker's requests to others. Closing is not waited for: the link
                // may be too broken for that.
                tokio::spawn(self.link.close());
                Err(error)
            }
        }
    }

    async fn work(
        &mut self,
        mut stop: impl Future<Output = ()> + Unpin,
    ) -> Result<StopReason, SessionError> {
        loop {
            let (wake_at, drain_until) = (self.wake_at(), self.drain_until);
            tokio::select! {
                input = poll_fn(|cx| self.poll_input(cx)) => {
                    self.count_workers();
                    self.handle(input?)?;
                }
                () = &mut stop, if drain_until.is_none() => self.drain().await?,
                () = sleep_until(wake_at) => {}
                () = sleep_until(drain_until) => return Ok(StopReason::DrainTimedOut),
            }
            self.handle_what_is_ready()?;
            self.look_at_clock()?;
            self.flush();
            if self.is_cut_off() {
                // Without the journal no transaction can be finished.
                let (last_read, drain_until) = (self.state.last_read, self.drain_until);
                let settings = self.settings;
                let resuming = self.follower.resume(last_read, &self.link);
                tokio::select! {
                    resumed = not_ready_if_long(settings, resuming) => resumed?,
                    () = &mut stop, if drain_until.is_none() => {
                        return Ok(StopReason::WithoutJournal);
                    }
                    () = sleep_until(drain_until) => {
                        return Ok(StopReason::DrainTimedOut);
                    }
                }
                self.appender.reader_resumed();
                self.tell_ready();
            }
            if self.drain_until.is_none() {
                self.take_more_or_less().await?;
            } else if self.is_drained() {
                return Ok(StopReason::Drained);
            }
        }
    }

    /// The worker is ready, unless the broker has an alarm.
    pub(super) fn tell_ready(&self) {
        self.settings.readiness.set(!self.watch.is_blocked());
    }

    /// The next input. The kinds take turns, so that none has to wait for all inputs of another.
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<Result<Input, SessionError>> {
        if let Poll::Ready(change) = self.watch.poll_next(cx) {
            return Poll::Ready(Ok(Input::Link(change)));
        }
        for turn in 0..TURNS {
            if let Poll::Ready(input) = self.poll_kind((self.turn + turn) % TURNS, cx) {
                self.turn = (self.turn + turn + 1) % TURNS;
                return Poll::Ready(input);
            }
        }
        Poll::Pending
    }

    fn poll_kind(
        &mut self,
        kind: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Input, SessionError>> {
        // While the broker takes no messages, no transaction is begun.
        let begins = !self.watch.is_blocked();
        match kind {
            0 => self.follower.poll_next(cx).map_ok(Input::Journal).map_err(Into::into),
            1 => self.appender.poll_next(cx).map_ok(|()| Input::Appended).map_err(Into::into),
            2 => self.outbox.poll_next(cx).map_ok(Input::Outbox).map_err(Into::into),
            3 => self.replies.poll_next(cx).map_ok(Input::Reply).map_err(SessionError::Closed),
            4 if begins => {
                self.inquiries.poll_next(cx).map_ok(Input::Inquiry).map_err(SessionError::Closed)
            }
            5 if begins && self.backlog.is_empty() && self.has_room() => {
                let taken = self.requests.poll_next(cx).map_err(SessionError::Closed);
                taken.map_ok(|(number, message)| Input::Requests(number, message))
            }
            6 => self.searches.poll_next(cx).map(|found| Ok(Input::Service(found))),
            7 => match &mut self.comparing {
                Some(comparing) => comparing.poll_unpin(cx).map(Input::ClocksCompared).map(Ok),
                None => Poll::Pending,
            },
            8 => self.packer.poll_next(cx).map(|event| Ok(Input::Packs(event))),
            _ => Poll::Pending,
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let state = &self.state;
        // While the broker takes no messages, deadlines wait.
        let is_blocked = self.watch.is_blocked();
        let deadline = state.coordinator.next_deadline().filter(|_| !is_blocked);
        let deadline = deadline.map(|at| state.clock.instant_of(at));
        let saturated = self.saturation.wake_at(self.requests.taking());
        let wake_at = deadline.into_iter().chain(self.outbox.wake_at());
        let wake_at = wake_at.chain(self.appender.wake_at()).chain(saturated);
        wake_at.chain(self.suspects.wake_at().filter(|_| !is_blocked)).min()
    }

    /// Handles all other inputs that are ready.
    fn handle_what_is_ready(&mut self) -> Result<(), SessionError> {
        for _ in 0..BATCH_MAX {
            let Poll::Ready(input) = self.poll_input(&mut Context::from_waker(Waker::noop()))
            else {
                break;
            };
            self.handle(input?)?;
        }
        let now = self.state.clock.now();
        let is_due = self.state.coordinator.next_deadline().is_some_and(|at| at <= now);
        if is_due && !self.watch.is_blocked() {
            self.dispatch(Event::DeadlineReached);
        }
        self.take_backlog();
        self.try_suspects();
        Ok(())
    }

    /// Notes how many workers share the services, if that has changed.
    fn count_workers(&mut self) {
        let counted = self.inquiries.consumers();
        if let Some(workers) = counted
            && counted != self.workers
        {
            self.workers = counted;
            self.dispatch(Event::WorkersCounted(workers));
        }
    }

    fn handle(&mut self, input: Input) -> Result<(), SessionError> {
        match input {
            Input::Journal(event) => self.journal_event(event),
            Input::Appended => {}
            Input::Outbox(OutboxEvent::Event(event)) | Input::Service(event) => {
                self.dispatch(event)
            }
            Input::Outbox(OutboxEvent::Safe(unacked)) => self.safe(unacked),
            Input::Outbox(OutboxEvent::MayTry(key)) => {
                if let Some(suspect) = self.suspects.recorded(&key, Instant::now()) {
                    self.dispatch_request(suspect);
                }
            }
            Input::Reply(message) => {
                self.reply_received(&message, Unacked::Reply(message.delivery_tag));
            }
            Input::Inquiry(message) => {
                self.reply_received(&message, Unacked::Inquiry(message.delivery_tag));
            }
            Input::Requests(number, message) => self.requests_received(number, message),
            Input::ClocksCompared(standing) => self.clocks_compared(standing)?,
            Input::Packs(event) => self.pack_event(event),
            Input::Link(change) => self.link_changed(change)?,
        }
        Ok(())
    }

    // ---- What comes in -----------------------------------------------------------------------

    fn journal_event(&mut self, event: JournalEvent) {
        match event {
            JournalEvent::Record(record) => {
                self.appender.read_back(record.message_id.as_ref());
                self.look_for_namesakes(&record);
                let event = read_event(self.state, record);
                self.dispatch(event);
            }
            JournalEvent::History(HistoryItem::Decisions(decisions)) => {
                decisions.into_iter().for_each(|it| self.dispatch(Event::HistoryRead(it)));
            }
            JournalEvent::History(HistoryItem::Ended { reaches }) => {
                self.dispatch(Event::HistoryEnded { reaches });
            }
            JournalEvent::CutOff => {
                tracing::warn!(
                    "the broker has ended the journal's consumer; resuming with another one"
                );
            }
        }
    }

    fn pack_event(&mut self, event: PackEvent) {
        match event {
            PackEvent::Written(pack) => self.state.pack_buffer.packed(&pack),
            PackEvent::NoneYet => {}
            PackEvent::Unusable(why) => {
                if self.state.packs_unusable.as_ref() != Some(&why) {
                    tell_packs_unusable(&why, &self.settings.names);
                    self.state.packs_unusable = Some(why);
                }
            }
        }
    }

    fn look_for_namesakes(&mut self, record: &Record) {
        // All records of a message are of one worker.
        let first = record.decisions.first();
        let is_own_name = first.is_some_and(|it| it.worker == *self.settings.worker());
        let append = record.message_id.as_ref().map(ShortString::as_str);
        if is_own_name && self.state.namesakes.read(append) {
            tracing::warn!(
                "another worker writes to the journal under this worker's name, and neither can compare \
                 its clock with the other's; give each worker its own name (`--name`)"
            );
        }
    }

    /// Whether the journal's consumer has ended, or has stopped.
    fn is_cut_off(&self) -> bool {
        let unread_for = self.appender.unread_for(Instant::now());
        if let Some(unread_for) = unread_for {
            tracing::warn!(
                "the broker has delivered nothing of `{}` for {:.1} s, though it has confirmed an \
                 append; resuming with another consumer",
                self.settings.names.journal(),
                unread_for.as_secs_f64()
            );
        }
        unread_for.is_some() || self.follower.is_cut_off()
    }

    fn reply_received(&mut self, message: &Message, unacked: Unacked) {
        let delivery = match unacked {
            Unacked::Inquiry(tag) => Some(Delivery(tag)),
            Unacked::Reply(_) | Unacked::Request(_) => None,
        };
        let inbound = inbound::reply(message, delivery);
        if let Some((service, prepares_max)) = inbound.prepares_max {
            self.searches.heard(&service);
            self.outbox.announced(service, prepares_max, Instant::now());
        }
        for event in inbound.events {
            if let Some(event) = self.searches.sift(event) {
                self.dispatch(event);
            }
        }
        if !inbound.complaints.is_empty() {
            let queue = match unacked {
                Unacked::Inquiry(_) => self.settings.names.inquiries(),
                Unacked::Reply(_) | Unacked::Request(_) => self.replies.name().clone(),
            };
            let reason = inbound.complaints.join("; ");
            return self.set_aside(queue.as_str(), message, &reason, OnConfirm::Ack(unacked));
        }
        let is_settling =
            matches!(unacked, Unacked::Inquiry(tag) if self.unsettled.inquiries.contains_key(&tag));
        if !is_settling {
            self.acknowledge(unacked);
        }
    }

    /// One of the messages that the acknowledgement of `unacked` waits for is safe.
    fn safe(&mut self, unacked: Unacked) {
        if let Unacked::Inquiry(tag) = unacked
            && let Some(waiting) = self.unsettled.inquiries.get_mut(&tag)
        {
            *waiting -= 1;
            if *waiting > 0 {
                return;
            }
            self.unsettled.inquiries.remove(&tag);
        }
        self.acknowledge(unacked);
    }

    fn acknowledge(&mut self, unacked: Unacked) {
        match unacked {
            Unacked::Request(delivery) => {
                self.unsettled.reply_of.remove(&delivery);
                self.requests.ack(delivery);
            }
            Unacked::Inquiry(tag) => self.inquiries.ack(tag),
            Unacked::Reply(tag) => self.replies.ack(tag),
        }
    }

    fn link_changed(&mut self, change: ConnectionEvent) -> Result<(), SessionError> {
        let is_open = self.outbox.is_open() && self.appender.is_open();
        match change {
            ConnectionEvent::Blocked | ConnectionEvent::Unblocked => {
                self.tell_ready();
                Ok(())
            }
            ConnectionEvent::Lost(error) => Err(SessionError::Lost(error)),
            ConnectionEvent::Stale => Err(SessionError::Stale),
            ConnectionEvent::ChannelLost(error) if !is_open => Err(SessionError::Lost(error)),
            ConnectionEvent::ChannelLost(_) => Ok(()),
        }
    }

    // ---- What goes out -----------------------------------------------------------------------

    /// Lets the coordinator handle an event, and performs the effects.
    fn dispatch(&mut self, event: Event) {
        let now = self.state.clock.now();
        let mut effects = std::mem::take(&mut self.effects);
        self.state.coordinator.handle(now, event, &mut effects);
        effects.drain(..).for_each(|effect| self.perform(effect));
        self.effects = effects;
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::FindService { service, after } => self.searches.begin(service, after),
            Effect::CheckService(service) => self.searches.check(&service),
            Effect::SendPrepare { service, prepare, spare } => {
                if let Some(it) = self.suspects.asked(&prepare.key) {
                    self.outbox.write_down(&it, OnConfirm::Nothing);
                }
                self.outbox.prepare(service, &prepare, spare);
            }
            // The command of a parked commit was published before its record.
            Effect::Send { to: Destination::AnyInstance, .. } => {}
            Effect::Send { service, to, command } => self.outbox.send(service, to, &command),
            Effect::Append(decision) => self.appender.append(decision),
            Effect::ReadHistory { from, until } => {
                self.follower.read_history(from, until, self.settings.coordinator.clock_margin);
            }
            Effect::Publish { key, delivery, answer } => {
                self.state.stats.count(&answer);
                let reply = self.unsettled.reply_of.get(&delivery).cloned().flatten();
                self.outbox.answer(reply, &answer, (key, delivery));
            }
            Effect::Ack(delivery) => self.acknowledge(Unacked::Request(delivery)),
            Effect::Release(delivery) => {
                self.unsettled.reply_of.remove(&delivery);
                self.requests.requeue(delivery);
            }
            Effect::Reject { request, delivery, reason } => {
                self.reject_request(&request, delivery, reason);
            }
            Effect::Park(parked) => {
                self.state.stats.parked += 1;
                tell_parked(&parked, &self.settings.names);
                self.outbox.park(parked);
            }
            Effect::Settle { key, service, ack, was_parked: true } => {
                tracing::info!(
                    transaction = %key, %service,
                    "a parked commit is settled: the service has applied it"
                );
                self.settle(key, service, ack);
            }
            // The coordinator asks for this when a request was delivered again, since another worker may
            // have parked the commit. If it has, the parked command is in the service's queue, and its
            // done will settle the record: see `parking`.
            Effect::Settle { key, service, was_parked: false, .. } => {
                tracing::debug!(transaction = %key, %service, "a commit that may be parked is done");
            }
            Effect::Report(anomaly) => {
                let WorkerState { undecidable, stats, .. } = &mut *self.state;
                report(&anomaly, &self.settings.names, &self.searches, undecidable, stats);
            }
        }
    }

    /// `ack`: the message of the queue of inquiries that has settled the commit. It is acknowledged when
    /// all records that follow from it are safe.
    fn settle(&mut self, key: TransactionKey, service: ServiceName, ack: Option<Delivery>) {
        let then = match ack {
            Some(Delivery(tag)) => {
                *self.unsettled.inquiries.entry(tag).or_default() += 1;
                OnConfirm::Ack(Unacked::Inquiry(tag))
            }
            None => OnConfirm::Nothing,
        };
        let settled_at = self.state.clock.now();
        let worker = self.settings.worker().clone();
        self.outbox.settle(&Settled { key, service, settled_at, worker }, then);
    }

    fn flush(&mut self) {
        let now = Instant::now();
        self.appender.flush(now);
        self.outbox.flush(now);
        self.follower.flush();
        if !self.watch.is_blocked() {
            self.packer.flush(&mut self.state.pack_buffer);
        }
        self.replies.flush();
        self.inquiries.flush();
        self.requests.flush();
    }

    // ---- More and less work ------------------------------------------------------------------

    /// Opens or closes a second consumer of requests: requests that wait for a full service must not keep
    /// out others.
    async fn take_more_or_less(&mut self) -> Result<(), SessionError> {
        let waiting = self.state.coordinator.waiting() + self.suspects.len();
        let in_flight_max = self.settings.coordinator.in_flight_max;
        let taking = self.requests.taking();
        match self.saturation.observe(waiting, in_flight_max, taking, Instant::now()) {
            Wanted::Same => Ok(()),
            Wanted::More => {
                let prefetch = self.settings.waiting_prefetch();
                let opening_more = self.requests.open(&self.link.consuming, prefetch);
                opening_more.await.map_err(opening("one more consumer of requests"))
            }
            Wanted::One => {
                let cancelling = self.requests.cancel_all_but(1);
                cancelling.await.map_err(opening("the queue of requests"))
            }
        }
    }

    async fn drain(&mut self) -> Result<(), SessionError> {
        tracing::info!(in_flight = self.state.coordinator.len(), "draining");
        self.drain_until = Some(Instant::now() + self.settings.drain);
        self.requests.cancel_all_but(0).await.map_err(opening("the queue of requests"))?;
        self.dispatch(Event::DrainRequested);
        self.give_back_requests();
        Ok(())
    }

    fn is_drained(&self) -> bool {
        self.state.coordinator.is_empty() && self.outbox.is_idle() && self.appender.is_idle()
    }

    /// Publishes what is left to publish, and closes the link.
    async fn close(mut self, reason: StopReason) -> StopReason {
        self.flush();
        self.state.stats.unclaimed += self.outbox.unclaimed;
        let said = async {
            self.appender.finish().await;
            self.outbox.finish().await;
        };
        if timeout(GOODBYE_MAX, said).await.is_err() {
            tracing::debug!("the broker did not confirm the last messages in time");
        }
        self.searches.close().await;
        self.link.close().await;
        reason
    }
}

/// Opens the queue for replies. It comes first, since it shows whether the node works; the probes that the
/// worker sends through it show that the link is alive.
pub(super) async fn open_replies(
    settings: &Settings,
    link: &ConnectionPair,
) -> Result<ExclusiveQueue, SessionError> {
    let Settings { names, .. } = settings;
    let worker = settings.worker();
    let replies = ExchangeBinding { exchange: names.replies(), key: names::key(worker, "*") };
    let stem = names.replies_of(worker);
    let queue = ExclusiveQueue::open(&link.consuming, stem, &[replies], REPLIES_PREFETCH).await;
    let queue = queue.map_err(|error| SessionError::Replies(Box::new(error)))?;
    let probed = queue.with_link_probe(&link.publishing, || true).await;
    probed.map_err(opening("a channel to probe the link on"))
}

/// Waits until reading the journal is resumed. If that takes long, the worker is not ready meanwhile.
async fn not_ready_if_long<T>(settings: &Settings, resuming: impl Future<Output = T>) -> T {
    let mut resuming = std::pin::pin!(resuming);
    if let Ok(resumed) = timeout(READ_AGAIN_SOON, &mut resuming).await {
        return resumed;
    }
    settings.readiness.set(false);
    resuming.await
}

async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
