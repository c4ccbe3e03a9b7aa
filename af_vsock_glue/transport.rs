// SPDX-License-Identifier: GPL-2.0

//! Transports of AF_VSOCK.
//!
//! C header: [`include/net/af_vsock.h`](srctree/include/net/af_vsock.h)

use super::{
    bindings,
    errno::ENOTCONN,
    message::{MessageDest, MessageSource},
    skb::SkBuff,
    socket::{Address, Directions, LockedSocket, Socket},
};
use core::{any::TypeId, marker::PhantomPinned, ptr};
use kernel::{
    error::{from_result, to_result},
    ffi::c_int,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed},
        Arc, ArcBorrow,
    },
    types::{ForeignOwnable, Opaque},
};

/// What a transport from guest to host implements.
///
/// Unless it is said otherwise the core calls in process context with the socket's lock held; sleeping is
/// allowed. A call for a socket comes after [`connect`](Self::connect) or after the transport itself made the
/// socket.
pub(crate) trait Transport: Send + Sync + Sized + 'static {
    /// What the transport keeps for a socket.
    type Connection: Send + Sync + 'static;

    /// The CID of this machine, [`Address::CID_ANY`] for none. Called under a mutex of the core, and perhaps sockets' locks; may
    /// not take a socket's lock.
    fn local_cid(&self) -> u32;

    /// A socket is given to the transport.
    fn new_connection(&self, socket: &LockedSocket<'_>) -> Result<Arc<Self::Connection>>;

    /// A connected or connecting socket is closed, or given to another transport.
    fn release(self: ArcBorrow<'_, Self>, socket: &mut LockedSocket<'_>);

    /// The socket goes away, though others may have references to its connection: frees all buffers that were
    /// [charged](SkBuff::charge_as_received) to it. Called without the lock, perhaps in a softirq; may not sleep.
    fn free_received(connection: &Self::Connection);

    /// The time is up that [`LockedSocket::schedule_close`] was given.
    fn close_timeout(&self, socket: &LockedSocket<'_>);

    /// Asks the peer for a connection.
    fn connect(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
    ) -> Result;

    /// Takes back packets of the socket that the device has not been given yet.
    fn cancel(self: ArcBorrow<'_, Self>, socket: &LockedSocket<'_>);

    /// Tells the peer of directions that were shut down.
    fn shutdown(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
        directions: Directions,
    ) -> Result;

    /// Whether a stream socket may be connected to `remote`.
    fn allows_stream(&self, socket: &Socket, remote: Address) -> bool;

    /// Whether a seqpacket socket may be connected to a CID.
    fn allows_seqpacket(&self, socket: &Socket, remote_cid: u32) -> bool;

    /// A reader is about to look for data, and to wait for `wanted` bytes at least.
    fn before_receive(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
        wanted: usize,
    ) -> Result;

    /// A reader of a stream that has read a part of what it wants finds more, perhaps after waiting for it. After an
    /// error it returns with the part.
    fn before_next_part(&self, connection: &Self::Connection) -> Result;

    /// A reader of a stream was told that there is something to read and has read nothing. It returns with an error.
    fn after_nothing(&self, socket: &LockedSocket<'_>, connection: &Self::Connection) -> Result;

    /// Moves up to `len` bytes into a message; copies them where it only peeks. Returns how many.
    fn receive(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
        message: &mut MessageDest,
        len: usize,
        peek: bool,
    ) -> Result<usize>;

    /// Moves the next message of a seqpacket socket into a message; copies it where it only peeks. Returns its
    /// length, whatever there was room for; 0 for none.
    fn receive_message(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
        message: &mut MessageDest,
        peek: bool,
    ) -> Result<usize>;

    /// Takes the next packet out of what was received, with what of it was not read. The boundaries of messages
    /// are lost.
    fn take_packet(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
    ) -> Option<SkBuff<()>>;

    /// A writer is about to send.
    fn before_send(&self, socket: &LockedSocket<'_>, connection: &Self::Connection) -> Result;

    /// Sends up to `len` bytes of a message. Returns how many; 0 where the peer has no room.
    fn send(
        self: ArcBorrow<'_, Self>,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
        message: &mut MessageSource,
        len: usize,
    ) -> Result<usize>;

    /// Sends a message of a seqpacket socket, of `len` bytes. Returns `len`, or 0 where the peer has no room for all of it; then
    /// [`Self::room_to_send`] is 0 until it has, or the caller waits. EMSGSIZE where it never will have.
    fn send_message(
        self: ArcBorrow<'_, Self>,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
        message: &mut MessageSource,
        len: usize,
    ) -> Result<usize>;

    /// Whether a reader who waits for `low_water` bytes, or for a message, need not wait: poll() asks.
    fn is_readable(&self, connection: &Self::Connection, low_water: usize) -> bool;

    /// Messages that can be received. May be called without the lock, and may not sleep.
    fn readable_messages(connection: &Self::Connection) -> usize;

    /// Bytes that can be received. May be called without the lock, and may not sleep.
    fn readable(connection: &Self::Connection) -> usize;

    /// Bytes that can be sent: a writer asks, who waits while it is 0. Not 0 where a message is to be tried.
    fn room_to_send(&self, socket: &LockedSocket<'_>, connection: &Self::Connection) -> usize;

    /// The same, for poll().
    fn writable(&self, socket: &LockedSocket<'_>, connection: &Self::Connection) -> usize;

    /// A writer that has found no room is about to wait for it.
    fn before_waiting_to_send(&self, connection: &Self::Connection);

    /// Bytes that were sent but not taken by the device. May be called without the lock, and may not sleep.
    fn unsent(connection: &Self::Connection) -> usize;

    /// The application changes the size of its receive buffer; returns what it becomes.
    fn set_buffer_size(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
        size: u64,
    ) -> u64;

    /// The application wants to be woken for no less than `low_water` bytes.
    fn set_low_water(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Self::Connection>,
        low_water: u32,
    );
}

/// The registered transport. The core has callbacks without any argument, so there is one place to find it.
static REGISTERED: Atomic<*mut Header> = Atomic::new(ptr::null_mut());

/// What is behind [`REGISTERED`], whatever the transport's type is.
#[repr(C)]
struct Header {
    // First, so that a pointer to it is a pointer to the header.
    operations: bindings::vsock_transport,
    transport: TypeId,
    context: *const (),
}

/// The registration of a transport from guest to host; dropping it unregisters it.
///
/// The core takes a reference to the module for every socket of the transport, so that a registration that
/// lives as long as the module is dropped only when there are none.
///
/// # Invariants
///
/// `context` of the header is the pointer of `_context`, of the type that `transport` names.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Transport> {
    #[pin]
    header: Opaque<Header>,
    _context: Arc<T>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: There is nothing to do with a shared registration.
unsafe impl<T: Transport> Sync for Registration<T> {}
// SAFETY: It may be dropped by any thread.
unsafe impl<T: Transport> Send for Registration<T> {}

impl<T: Transport> Registration<T> {
    /// Registers the transport.
    ///
    /// # Errors
    ///
    /// EBUSY where there is one from guest to host already.
    pub(crate) fn new<'a>(
        module: &'static ThisModule,
        context: Arc<T>,
    ) -> impl PinInit<Self, Error> + 'a {
        try_pin_init!(Self {
            header <- Opaque::try_ffi_init({
                let context = Arc::as_ptr(&context);
                move |slot: *mut Header| {
                    // SAFETY: `slot` is valid for writes.
                    unsafe {
                        slot.write(Header {
                            operations: operations::<T>(module),
                            transport: TypeId::of::<T>(),
                            context: context.cast(),
                        })
                    };
                    REGISTERED
                        .cmpxchg(ptr::null_mut(), slot, Full)
                        .map_err(|_| EBUSY)?;
                    // SAFETY: The operations stay where they are until they are unregistered.
                    to_result(unsafe {
                        bindings::vsock_core_register(
                            &raw const (*slot).operations,
                            bindings::VSOCK_TRANSPORT_F_G2H as c_int,
                        )
                    })
                    .inspect_err(|error| {
                        REGISTERED.store(ptr::null_mut(), Relaxed);
                        if *error == EBUSY {
                            pr_err!(
                                "another transport from guest to host is loaded (vmw_vsock_virtio_transport?), remove it first\n"
                            );
                        }
                    })
                }
            }),
            _context: context,
            _pin: PhantomPinned,
        })
    }
}

#[pinned_drop]
impl<T: Transport> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: It was registered when it was made. Callbacks without a socket run under a mutex that the
        // function takes; callbacks for a socket hold the module, and so this, by the socket's reference.
        unsafe { bindings::vsock_core_unregister(self.header.get().cast()) };
        REGISTERED.store(ptr::null_mut(), Relaxed);
    }
}

/// The registered header.
fn registered() -> *mut Header {
    REGISTERED.load(Acquire)
}

/// Whether a socket's transport is the registered one and a `T`.
///
/// # Safety
///
/// `operations` is what a socket has or had for a transport, and the registered one stays so: the caller is one of its
/// callbacks, has a socket of it, or has the device, which goes before the transport does.
pub(super) unsafe fn is_ours<T: Transport>(operations: *const bindings::vsock_transport) -> bool {
    let header = registered();
    !header.is_null()
        && ptr::eq(operations, header.cast())
        // SAFETY: The registered transport stays so, as the caller promises.
        && unsafe { (*header).transport == TypeId::of::<T>() }
}

/// The context of the registered transport, `None` where that is none or no `T`.
///
/// # Safety
///
/// The transport stays registered for `'a`: the caller is one of its callbacks, or one of its sockets is
/// known to live.
pub(super) unsafe fn context<'a, T: Transport>() -> Option<ArcBorrow<'a, T>> {
    let header = registered();
    // SAFETY: As the caller promises, and by the invariant of `Registration`.
    unsafe {
        if header.is_null() || (*header).transport != TypeId::of::<T>() {
            return None;
        }
        Some(ArcBorrow::from_raw((*header).context.cast()))
    }
}

/// The connection state of a socket that is `T`'s.
///
/// # Safety
///
/// The socket's transport is `T`, and is not taken from it during `'a`.
pub(super) unsafe fn borrow_connection<'a, T: Transport>(
    vsk: *mut bindings::vsock_sock,
) -> Option<ArcBorrow<'a, T::Connection>> {
    // SAFETY: `init()` below is what sets the pointer of a socket that is ours.
    unsafe {
        let trans = (*vsk).trans;
        if trans.is_null() {
            return None;
        }
        Some(Arc::<T::Connection>::borrow(trans))
    }
}

type Vsk = *mut bindings::vsock_sock;
type Msg = *mut bindings::msghdr;
type RecvNotify = *mut bindings::vsock_transport_recv_notify_data;
type SendNotify = *mut bindings::vsock_transport_send_notify_data;

/// Does what a callback of the core is for: `act` gets the context, the locked socket and its connection.
///
/// # Safety
///
/// The core calls for a socket that was given to `T`, and holds the socket's lock.
unsafe fn with_socket<T: Transport, R>(
    vsk: Vsk,
    act: impl FnOnce(ArcBorrow<'_, T>, &LockedSocket<'_>, ArcBorrow<'_, T::Connection>) -> Result<R>,
) -> Result<R> {
    // SAFETY: As the caller promises: the transport is registered, the socket valid and locked, and it stays
    // `T`'s, because only the caller could give it to another transport.
    let (context, socket, connection) = unsafe {
        (
            context::<T>().ok_or(ENODEV)?,
            LockedSocket::assume_locked(Socket::from_raw(vsk)),
            borrow_connection::<T>(vsk).ok_or(ENOTCONN)?,
        )
    };
    act(context, &socket, connection)
}

/// Asks the connection of a socket for a number; 0 where it has none.
///
/// # Safety
///
/// The core calls for a socket that was given to `T`.
unsafe fn ask_connection<T: Transport>(vsk: Vsk, ask: fn(&T::Connection) -> usize) -> usize {
    // SAFETY: As the caller promises.
    unsafe { borrow_connection::<T>(vsk) }.map_or(0, |connection| ask(&connection))
}

fn operations<T: Transport>(module: &'static ThisModule) -> bindings::vsock_transport {
    bindings::vsock_transport {
        module: module.as_ptr().cast(),
        init: Some(init::<T>),
        destruct: Some(destruct::<T>),
        release: Some(release::<T>),
        cancel_pkt: Some(cancel_pkt::<T>),
        connect: Some(connect::<T>),
        stream_dequeue: Some(stream_dequeue::<T>),
        stream_enqueue: Some(stream_enqueue::<T>),
        stream_has_data: Some(stream_has_data::<T>),
        stream_has_space: Some(stream_has_space::<T>),
        stream_rcvhiwat: Some(stream_rcvhiwat),
        stream_is_active: Some(stream_is_active),
        stream_allow: Some(stream_allow::<T>),
        seqpacket_allow: Some(seqpacket_allow::<T>),
        seqpacket_dequeue: Some(seqpacket_dequeue::<T>),
        seqpacket_enqueue: Some(seqpacket_enqueue::<T>),
        seqpacket_has_data: Some(seqpacket_has_data::<T>),
        read_skb: Some(read_skb::<T>),
        msgzerocopy_allow: Some(msgzerocopy_allow),
        notify_poll_in: Some(notify_poll_in::<T>),
        notify_poll_out: Some(notify_poll_out::<T>),
        notify_recv_init: Some(notify_recv_init::<T>),
        notify_recv_pre_block: Some(notify_recv_pre_block),
        notify_recv_pre_dequeue: Some(notify_recv_pre_dequeue::<T>),
        notify_recv_post_dequeue: Some(notify_recv_post_dequeue::<T>),
        notify_send_init: Some(notify_send_init::<T>),
        notify_send_pre_block: Some(notify_send_pre_block::<T>),
        notify_send_pre_enqueue: Some(notify_send_pre_enqueue),
        notify_send_post_enqueue: Some(notify_send_post_enqueue),
        notify_buffer_size: Some(notify_buffer_size::<T>),
        notify_set_rcvlowat: Some(notify_set_rcvlowat::<T>),
        unsent_bytes: Some(unsent_bytes::<T>),
        shutdown: Some(shutdown::<T>),
        get_local_cid: Some(get_local_cid::<T>),
        has_remote_cid: Some(has_remote_cid),
        ..Default::default()
    }
}

// The callbacks. Those of a socket are called with its lock held, with the exceptions that `Transport` names.

extern "C" fn init<T: Transport>(vsk: Vsk, _parent: Vsk) -> c_int {
    from_result(|| {
        // SAFETY: The core calls with a locked socket that no transport has.
        unsafe {
            let context = context::<T>().ok_or(ENODEV)?;
            let socket = LockedSocket::assume_locked(Socket::from_raw(vsk));
            (*vsk).trans = context.new_connection(&socket)?.into_foreign();
        }
        Ok(0)
    })
}

extern "C" fn destruct<T: Transport>(vsk: Vsk) {
    // SAFETY: The core calls once for each `init()`, when nobody else uses the socket or with its lock held.
    unsafe {
        let trans = core::mem::replace(&mut (*vsk).trans, ptr::null_mut());
        if let Some(connection) = Arc::<T::Connection>::try_from_foreign(trans) {
            T::free_received(&connection);
        }
    }
}

extern "C" fn release<T: Transport>(vsk: Vsk) {
    // SAFETY: A callback for a socket, with its lock held. Its connection is not borrowed here, as the lock
    // may be released for a while.
    unsafe {
        if let Some(context) = context::<T>() {
            context.release(&mut LockedSocket::assume_locked(Socket::from_raw(vsk)));
        }
    }
}

extern "C" fn cancel_pkt<T: Transport>(vsk: Vsk) -> c_int {
    // SAFETY: A callback for a socket, with its lock held.
    unsafe {
        if let Some(context) = context::<T>() {
            context.cancel(&LockedSocket::assume_locked(Socket::from_raw(vsk)));
        }
    }
    0
}

extern "C" fn connect<T: Transport>(vsk: Vsk) -> c_int {
    // SAFETY: A callback for a socket, with its lock held.
    from_result(|| unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.connect(socket, connection)?;
            Ok(0)
        })
    })
}

extern "C" fn shutdown<T: Transport>(vsk: Vsk, mode: c_int) -> c_int {
    // SAFETY: A callback for a socket, with its lock held.
    from_result(|| unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            let directions = Directions::from_bits(mode as u32);
            context.shutdown(socket, connection, directions)?;
            Ok(0)
        })
    })
}

extern "C" fn stream_dequeue<T: Transport>(vsk: Vsk, msg: Msg, len: usize, flags: c_int) -> isize {
    let peek = flags as u32 & bindings::MSG_PEEK != 0;
    // SAFETY: The core passes the message of a recvmsg().
    let message = unsafe { MessageDest::from_raw(msg) };
    // SAFETY: A callback for a socket, with its lock held.
    size_or_errno(unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.receive(socket, connection, message, len, peek)
        })
    })
}

extern "C" fn stream_enqueue<T: Transport>(vsk: Vsk, msg: Msg, len: usize) -> isize {
    // SAFETY: The core passes the message of a sendmsg().
    let message = unsafe { MessageSource::from_raw(msg) };
    // SAFETY: A callback for a socket, with its lock held.
    size_or_errno(unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.send(socket, connection, message, len)
        })
    })
}

fn size_or_errno(size: Result<usize>) -> isize {
    match size {
        Ok(size) => isize::try_from(size).unwrap_or(isize::MAX),
        Err(error) => error.to_errno() as isize,
    }
}

extern "C" fn stream_has_data<T: Transport>(vsk: Vsk) -> i64 {
    // SAFETY: A callback for a socket.
    unsafe { ask_connection::<T>(vsk, T::readable) as i64 }
}

extern "C" fn stream_has_space<T: Transport>(vsk: Vsk) -> i64 {
    // SAFETY: A callback for a socket, with its lock held: the core's sendmsg() asks.
    unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            Ok(context.room_to_send(socket, &connection))
        })
    }
    .unwrap_or(0) as i64
}

extern "C" fn unsent_bytes<T: Transport>(vsk: Vsk) -> isize {
    // SAFETY: A callback for a socket.
    unsafe { ask_connection::<T>(vsk, T::unsent) as isize }
}

extern "C" fn stream_rcvhiwat(vsk: Vsk) -> u64 {
    // SAFETY: A callback with the lock held.
    unsafe { (*vsk).buffer_size }
}

extern "C" fn stream_is_active(_vsk: Vsk) -> bool {
    true
}

extern "C" fn stream_allow<T: Transport>(vsk: Vsk, cid: u32, port: u32) -> bool {
    // SAFETY: A callback for a valid socket.
    unsafe {
        context::<T>().is_some_and(|context| {
            context.allows_stream(Socket::from_raw(vsk), Address { cid, port })
        })
    }
}

extern "C" fn seqpacket_dequeue<T: Transport>(vsk: Vsk, msg: Msg, flags: c_int) -> isize {
    let peek = flags as u32 & bindings::MSG_PEEK != 0;
    // SAFETY: The core passes the message of a recvmsg().
    let message = unsafe { MessageDest::from_raw(msg) };
    // SAFETY: A callback for a socket, with its lock held.
    size_or_errno(unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.receive_message(socket, connection, message, peek)
        })
    })
}

extern "C" fn seqpacket_enqueue<T: Transport>(vsk: Vsk, msg: Msg, len: usize) -> c_int {
    // SAFETY: The core passes the message of a sendmsg().
    let message = unsafe { MessageSource::from_raw(msg) };
    // SAFETY: A callback for a socket, with its lock held.
    let sent = size_or_errno(unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.send_message(socket, connection, message, len)
        })
    });
    c_int::try_from(sent).unwrap_or(c_int::MAX)
}

extern "C" fn seqpacket_has_data<T: Transport>(vsk: Vsk) -> u32 {
    // SAFETY: A callback for a socket.
    let messages = unsafe { ask_connection::<T>(vsk, T::readable_messages) };
    u32::try_from(messages).unwrap_or(u32::MAX)
}

extern "C" fn seqpacket_allow<T: Transport>(vsk: Vsk, remote_cid: u32) -> bool {
    // SAFETY: A callback for a valid socket.
    unsafe {
        context::<T>()
            .is_some_and(|context| context.allows_seqpacket(Socket::from_raw(vsk), remote_cid))
    }
}

/// Gives all that was received to an actor, such as the BPF programs of a sockmap.
extern "C" fn read_skb<T: Transport>(vsk: Vsk, actor: bindings::skb_read_actor_t) -> c_int {
    // SAFETY: The core's `sk_data_ready` callback calls, so that the socket's lock is held: see
    // `LockedSocket::wake_readers()`.
    from_result(|| unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            let actor = actor.ok_or(EINVAL)?;
            let mut taken: c_int = 0;
            while let Some(packet) = context.take_packet(socket, connection) {
                // A program looks at the packet's owner for the addresses of the socket.
                packet.set_owner_with_reference(socket)?;
                let packet = packet.into_raw();
                // Nothing of ours is shown to it.
                bindings::vsock_glue_clear_cb(packet);
                // The packet is the actor's, also where it fails.
                match actor(socket.as_sock(), packet) {
                    // The sum tells whether there was something; a socket may hold more than it can say.
                    len if len >= 0 => taken = taken.saturating_add(len),
                    error if taken == 0 => return Err(Error::from_errno(error)),
                    _ => break,
                }
            }
            Ok(taken)
        })
    })
}

extern "C" fn msgzerocopy_allow() -> bool {
    true
}

extern "C" fn notify_poll_in<T: Transport>(vsk: Vsk, target: usize, ready: *mut bool) -> c_int {
    // SAFETY: A callback for a socket, with its lock held; `ready` is valid for writes.
    unsafe {
        *ready = with_socket::<T, _>(vsk, |context, _, connection| {
            Ok(context.is_readable(&connection, target))
        })
        .unwrap_or(false);
    }
    0
}

extern "C" fn notify_poll_out<T: Transport>(vsk: Vsk, target: usize, ready: *mut bool) -> c_int {
    // SAFETY: A callback for a socket, with its lock held; `ready` is valid for writes.
    unsafe {
        *ready = with_socket::<T, _>(vsk, |context, socket, connection| {
            Ok(context.writable(socket, &connection) >= target)
        })
        .unwrap_or(false);
    }
    0
}

extern "C" fn notify_recv_init<T: Transport>(vsk: Vsk, target: usize, data: RecvNotify) -> c_int {
    // SAFETY: A callback for a socket, with its lock held; `data` is the transport's own during the call of the
    // application.
    from_result(|| unsafe {
        (*data).data1 = target as u64;
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.before_receive(socket, connection, target)?;
            Ok(0)
        })
    })
}

/// Called when the task's state says already that it sleeps, so this may not.
extern "C" fn notify_recv_pre_block(_vsk: Vsk, _target: usize, _data: RecvNotify) -> c_int {
    0
}

extern "C" fn notify_recv_pre_dequeue<T: Transport>(
    vsk: Vsk,
    target: usize,
    data: RecvNotify,
) -> c_int {
    // SAFETY: A callback for a socket, with its lock held, after `notify_recv_init()` with the same `data`.
    from_result(|| unsafe {
        // The core counts down what it still wants.
        if (*data).data1 != target as u64 {
            with_socket::<T, _>(vsk, |context, _, connection| {
                context.before_next_part(&connection)
            })?;
        }
        Ok(0)
    })
}

extern "C" fn notify_recv_post_dequeue<T: Transport>(
    vsk: Vsk,
    _target: usize,
    read: isize,
    _data_read: bool,
    _data: RecvNotify,
) -> c_int {
    if read > 0 {
        return 0;
    }
    // The core returns nothing but this error then: other errors give way to the end of the stream.
    // SAFETY: A callback for a socket, with its lock held.
    from_result(|| unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.after_nothing(socket, &connection)?;
            Ok(0)
        })
    })
}

extern "C" fn notify_send_init<T: Transport>(vsk: Vsk, _data: SendNotify) -> c_int {
    // SAFETY: A callback for a socket, with its lock held.
    from_result(|| unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.before_send(socket, &connection)?;
            Ok(0)
        })
    })
}

extern "C" fn notify_send_pre_block<T: Transport>(vsk: Vsk, _data: SendNotify) -> c_int {
    // SAFETY: A callback for a socket, with its lock held.
    from_result(|| unsafe {
        with_socket::<T, _>(vsk, |context, _, connection| {
            context.before_waiting_to_send(&connection);
            Ok(0)
        })
    })
}

extern "C" fn notify_send_pre_enqueue(_vsk: Vsk, _data: SendNotify) -> c_int {
    0
}

extern "C" fn notify_send_post_enqueue(_vsk: Vsk, _written: isize, _data: SendNotify) -> c_int {
    0
}

extern "C" fn notify_buffer_size<T: Transport>(vsk: Vsk, size: *mut u64) {
    // SAFETY: A callback for a socket, with its lock held; `size` is valid.
    let changed = unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            *size = context.set_buffer_size(socket, connection, *size);
            Ok(())
        })
    };
    // The error says that there is no connection whose buffer it is.
    let _ = changed;
}

extern "C" fn notify_set_rcvlowat<T: Transport>(vsk: Vsk, low_water: c_int) -> c_int {
    // SAFETY: A callback for a socket, with its lock held.
    from_result(|| unsafe {
        with_socket::<T, _>(vsk, |context, socket, connection| {
            context.set_low_water(socket, connection, u32::try_from(low_water)?);
            Ok(0)
        })
    })
}

extern "C" fn get_local_cid<T: Transport>() -> u32 {
    // SAFETY: A callback.
    unsafe { context::<T>() }.map_or(Address::CID_ANY, |context| context.local_cid())
}

/// The host may forward to any CID, so each may be reachable.
extern "C" fn has_remote_cid(_vsk: Vsk, _cid: u32) -> bool {
    true
}
