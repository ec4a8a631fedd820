//! The byte stream that lapin reads: the broker's, screened by a [`FrameFilter`].
//!
//! lapin accepts only a stream of the type that its runtime connects with. So this module has its
//! own runtime, which is tokio's except for that type.

use std::{
    io::{self, IoSlice, Read, Write},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use async_rs::{Runtime, Tokio, traits::Reactor, util::RuntimeParts};
use futures_util::{AsyncRead, AsyncWrite, Stream, future::Either};
use rustls_connector::AsyncTlsStream;

use crate::transport::amqp::frames::{FRAME_MAX, FilterStep, FrameFilter, ReturnedMessages};

/// How much is read at once, unless a frame to be screened is larger.
const READ_SIZE: usize = 64 * 1024;

/// The type of stream that tokio connects with.
pub(super) type TokioTcpStream = <Tokio as Reactor>::TcpStream;

/// The broker's stream: plain, or over TLS.
pub(super) type BrokerStream = Either<TokioTcpStream, AsyncTlsStream<TokioTcpStream>>;

/// A stream whose reader gets only what lapin can parse.
pub(super) struct ScreenedStream<S> {
    stream: S,
    filter: FrameFilter,
    /// The bytes read. From `start` they may be passed on, from `screened` they must be screened,
    /// from `end` on there are none.
    buffer: Vec<u8>,
    start: usize,
    screened: usize,
    end: usize,
}

impl<S> ScreenedStream<S> {
    pub(super) fn new(stream: S, filter: FrameFilter) -> Self {
        Self { stream, filter, buffer: vec![0; READ_SIZE], start: 0, screened: 0, end: 0 }
    }

    /// Screens the bytes read; returns whether there was progress.
    fn screen(&mut self) -> io::Result<bool> {
        let unscreened = self.buffer.get_mut(self.screened..self.end).unwrap_or_default();
        match self.filter.step(unscreened) {
            FilterStep::Pass(size) => self.screened += size,
            FilterStep::Drop(size) => {
                self.screened += size;
                self.start = self.screened;
            }
            FilterStep::Wait => return Ok(false),
            FilterStep::Refuse(why) => return Err(io::Error::new(io::ErrorKind::InvalidData, why)),
        }
        Ok(true)
    }

    /// Makes room to read more after the incomplete rest: never more than a frame.
    fn make_room(&mut self) {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        (self.start, self.screened) = (0, 0);
        if self.end == self.buffer.len() {
            self.buffer.resize(self.buffer.len() * 2, 0);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ScreenedStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while this.start == this.screened {
            if this.screen()? {
                continue;
            }
            this.make_room();
            let room = this.buffer.get_mut(this.end..).unwrap_or_default();
            let size = ready!(Pin::new(&mut this.stream).poll_read(context, room))?;
            if size == 0 {
                return Poll::Ready(Ok(0));
            }
            this.end += size;
        }
        let size = to.len().min(this.screened - this.start);
        let passed = this.buffer.get(this.start..this.start + size).unwrap_or_default();
        if let Some(to) = to.get_mut(..size) {
            to.copy_from_slice(passed);
        }
        this.start += size;
        Poll::Ready(Ok(size))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ScreenedStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_close(context)
    }
}

/// The runtime from which lapin gets its streams: tokio's, with screened streams.
pub(super) fn screening_runtime() -> Runtime<RuntimeParts<Tokio, ScreeningReactor>> {
    let tokio = Tokio::current();
    Runtime::new(RuntimeParts::new(tokio.clone(), ScreeningReactor(tokio)))
}

/// tokio's reactor, except for the type of its streams.
#[derive(Clone, Debug)]
pub(super) struct ScreeningReactor(Tokio);

impl Reactor for ScreeningReactor {
    type TcpStream = ScreenedStream<BrokerStream>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// There is no socket to register: lapin doesn't call this, and the trait doesn't allow passing
    /// it on.
    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<TokioTcpStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move {
            let stream = Either::Left(connecting.await?);
            Ok(ScreenedStream::new(
                stream,
                FrameFilter::new(FRAME_MAX, ReturnedMessages::default()),
            ))
        }
    }
}
