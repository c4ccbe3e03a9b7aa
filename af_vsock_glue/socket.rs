// SPDX-License-Identifier: GPL-2.0

//! AF_VSOCK sockets: their lock, their state, and the core's tables of them.
//!
//! C headers: [`include/net/af_vsock.h`](srctree/include/net/af_vsock.h),
//! [`include/net/sock.h`](srctree/include/net/sock.h)

use super::{
    bindings,
    transport::{self, Transport},
    workqueue::OwnedQueue,
};
use core::{
    marker::PhantomData,
    mem::{offset_of, ManuallyDrop},
    ops::{Deref, DerefMut},
    ptr,
    ptr::NonNull,
};
use kernel::{
    error::to_result,
    ffi::c_int,
    prelude::*,
    sync::{
        aref::{ARef, AlwaysRefCounted},
        ArcBorrow,
    },
    types::Opaque,
};

/// An AF_VSOCK address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// Context identifier.
    pub(crate) cid: u32,
    /// Port number.
    pub(crate) port: u32,
}

impl Address {
    /// The CID that stands for all of this machine's (`VMADDR_CID_ANY`).
    pub(crate) const CID_ANY: u32 = bindings::VMADDR_CID_ANY as u32;

    fn to_raw(self) -> bindings::sockaddr_vm {
        let mut raw = bindings::sockaddr_vm::default();
        // SAFETY: `raw` is valid for writes.
        unsafe { bindings::vsock_addr_init(&mut raw, self.cid, self.port) };
        raw
    }

    fn from_raw(raw: &bindings::sockaddr_vm) -> Self {
        Self {
            cid: raw.svm_cid,
            port: raw.svm_port,
        }
    }
}

/// The states of a connection-oriented socket, named as the core uses them (`sk->sk_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketState {
    /// `TCP_CLOSE`: not connected.
    Closed,
    /// `TCP_SYN_SENT`: connecting.
    Connecting,
    /// `TCP_ESTABLISHED`: connected.
    Established,
    /// `TCP_CLOSING`: disconnecting.
    Closing,
    /// `TCP_LISTEN`: listening.
    Listening,
}

/// The kinds of sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketKind {
    /// `SOCK_STREAM`.
    Stream,
    /// `SOCK_SEQPACKET`.
    SeqPacket,
    /// `SOCK_DGRAM`.
    Datagram,
}

/// Set of directions that were shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Directions(u32);

impl Directions {
    /// Neither.
    pub(crate) const NONE: Self = Self(0);
    /// Receiving (`RCV_SHUTDOWN`).
    pub(crate) const RECEIVE: Self = Self(bindings::RCV_SHUTDOWN);
    /// Sending (`SEND_SHUTDOWN`).
    pub(crate) const SEND: Self = Self(bindings::SEND_SHUTDOWN);
    /// Both (`SHUTDOWN_MASK`).
    pub(crate) const BOTH: Self = Self(bindings::SHUTDOWN_MASK);

    /// The set as bits: `RCV_SHUTDOWN` is 1, `SEND_SHUTDOWN` 2.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// The set of such bits; others are ignored.
    pub(crate) fn from_bits(bits: u32) -> Self {
        Self(bits & bindings::SHUTDOWN_MASK)
    }

    /// Whether all of `other` are in the set.
    pub(crate) fn contains(self, other: Self) -> bool {
        self.with(other) == self
    }

    /// The set with those of `other`.
    pub(crate) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// How many sockets [`Socket::some_connected`] returns at the most.
pub(crate) const BATCH: usize = 64;

/// An AF_VSOCK socket, `struct vsock_sock`.
///
/// # Invariants
///
/// It is a valid socket of the family, and lives at least as long as a reference to this.
#[repr(transparent)]
pub(crate) struct Socket(Opaque<bindings::vsock_sock>);

// SAFETY: Sockets are shared between threads, and so is the right to drop a reference.
unsafe impl Send for Socket {}
// SAFETY: What is done without the socket's lock is safe to do from several threads.
unsafe impl Sync for Socket {}

// SAFETY: It is what sock_hold() and sock_put() are for.
unsafe impl AlwaysRefCounted for Socket {
    fn inc_ref(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_sock_hold(self.as_sock()) }
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives a reference away.
        unsafe { bindings::vsock_glue_sock_put(obj.as_ptr().cast()) }
    }
}

/// Whether something is in a list by this link of it.
///
/// # Safety
///
/// The link is valid, and initialised or deleted as `list_del_init()` does; nobody puts it into a list or takes it out
/// meanwhile. Its neighbours may change.
unsafe fn is_listed(link: *const bindings::list_head) -> bool {
    // SAFETY: As the caller promises; what neighbours change is read once, and is never the link itself.
    let next = unsafe { ptr::read_volatile(&raw const (*link).next) };
    !ptr::eq(next.cast_const(), link)
}

impl Socket {
    /// Makes a reference out of a pointer of the core.
    ///
    /// # Safety
    ///
    /// `vsk` is valid for `'a`.
    pub(super) unsafe fn from_raw<'a>(vsk: *mut bindings::vsock_sock) -> &'a Self {
        // SAFETY: As the caller promises; the type is transparent.
        unsafe { &*vsk.cast() }
    }

    /// Takes over a reference that a function of the core returned, null for none.
    ///
    /// # Safety
    ///
    /// `sk` is null or an AF_VSOCK socket with a reference that the caller gives away.
    unsafe fn take(sk: *mut bindings::sock) -> Option<ARef<Self>> {
        // SAFETY: As the caller promises; `sk` is the first field of `struct vsock_sock`.
        NonNull::new(sk.cast()).map(|sk| unsafe { ARef::from_raw(sk) })
    }

    /// The C socket.
    pub(super) fn as_raw(&self) -> *mut bindings::vsock_sock {
        self.0.get()
    }

    /// The C socket's generic part.
    pub(super) fn as_sock(&self) -> *mut bindings::sock {
        self.0.get().cast()
    }

    /// Finds the connected socket whose peer is `remote` and whose port is that of `local`.
    ///
    /// Sockets of all namespaces in global mode are looked at. Takes `vsock_table_lock`; process context.
    pub(crate) fn find_connected(remote: Address, local: Address) -> Option<ARef<Self>> {
        let (mut remote, mut local) = (remote.to_raw(), local.to_raw());
        // SAFETY: The addresses are valid, a null namespace stands for the global mode; the function
        // returns a reference.
        unsafe {
            Self::take(bindings::vsock_find_connected_socket_net(
                &mut remote,
                &mut local,
                ptr::null_mut(),
            ))
        }
    }

    /// Finds the socket that is bound to `local`, or to its port at any CID. Takes `vsock_table_lock`; process context.
    pub(crate) fn find_bound(local: Address) -> Option<ARef<Self>> {
        let mut local = local.to_raw();
        // SAFETY: As above.
        unsafe {
            Self::take(bindings::vsock_find_bound_socket_net(
                &mut local,
                ptr::null_mut(),
            ))
        }
    }

    /// References to some sockets in the table of connected ones that belong to transport `T`: to all, where
    /// there are at most [`BATCH`].
    pub(crate) fn some_connected<T: Transport>() -> [Option<ARef<Self>>; BATCH] {
        let table = &raw mut bindings::vsock_connected_table;
        // SAFETY: It is the table of connected sockets, linked by that field. A socket's transport may change
        // meanwhile; the caller looks again under the socket's lock.
        unsafe {
            Self::some_of(
                table.cast::<bindings::list_head>(),
                (*table).len(),
                offset_of!(bindings::vsock_sock, connected_table),
                |vsk| transport::is_ours::<T>(ptr::read_volatile(&raw const (*vsk).transport)),
            )
        }
    }

    /// References to all sockets in the table of connected ones that belong to transport `T`. Sleeps.
    ///
    /// Who becomes connected meanwhile may be missing.
    pub(crate) fn all_connected<T: Transport>() -> Result<KVVec<ARef<Self>>> {
        let table = &raw mut bindings::vsock_connected_table;
        let mut all = KVVec::new();
        // SAFETY: Only the length of the array is asked for.
        for list in 0..unsafe { (*table).len() } {
            let before = all.len();
            loop {
                // SAFETY: It is one of the table's lists, which the lock of the tables protects.
                let missing = unsafe {
                    Self::append_list::<T>(table.cast::<bindings::list_head>().add(list), &mut all)
                };
                if missing == 0 {
                    break;
                }
                // Once more, with room for those and for some that may come.
                all.truncate(before);
                all.reserve(missing + BATCH, GFP_KERNEL)?;
            }
        }
        Ok(all)
    }

    /// Appends references to the sockets of a list of the table of connected ones that belong to transport `T`, as
    /// far as there is room in `all`. Returns 0, or how many there are in the list where some had no room.
    ///
    /// # Safety
    ///
    /// `head` is one of the table's lists.
    unsafe fn append_list<T: Transport>(
        head: *mut bindings::list_head,
        all: &mut KVVec<ARef<Self>>,
    ) -> usize {
        let (mut found, mut missing) = (0, 0);
        // SAFETY: The lock protects the list, and its sockets from going away.
        unsafe {
            bindings::vsock_glue_table_lock();
            let mut at = (*head).next;
            while !ptr::eq(at, head) {
                let link = offset_of!(bindings::vsock_sock, connected_table);
                let vsk = at.byte_sub(link).cast::<bindings::vsock_sock>();
                if transport::is_ours::<T>(ptr::read_volatile(&raw const (*vsk).transport)) {
                    found += 1;
                    if all
                        .push_within_capacity(Self::from_raw(vsk).into())
                        .is_err()
                    {
                        missing += 1;
                    }
                }
                at = (*at).next;
            }
            bindings::vsock_glue_table_unlock();
        }
        if missing == 0 {
            0
        } else {
            found
        }
    }

    /// Gives all sockets that are bound to a CID that the guest had before, and have no connection, the CID `new`
    /// instead; also those that `T` is connecting, as the answer comes to the guest's present CID. Sleeps, and takes their
    /// locks.
    ///
    /// A socket whose connection ends keeps its address, and so may one that is bound just now; the next change of the CID
    /// finds these, or the next connect(). The caller has the device, or is about to have it.
    pub(crate) fn change_bound_cid<T: Transport>(new: u32) {
        // SAFETY: `matches` gets valid sockets, with one of the locks. The caller has the device. A socket that was changed is
        // bound to the present CID.
        unsafe {
            Self::for_each_bound(
                |vsk| Self::is_bound_to_other(vsk, new) && Self::is_unconnected::<T>(vsk),
                |socket| socket.change_own_cid(new),
            );
        }
    }

    /// Calls `end` with the sockets that `T` is connecting; it ends that. Sleeps, and takes their locks. The caller has the
    /// device.
    pub(crate) fn for_each_connecting<T: Transport>(end: impl Fn(&LockedSocket<'_>)) {
        // SAFETY: As above; whoever connects is bound. One that connects no more does not match.
        unsafe { Self::for_each_bound(|vsk| Self::is_connecting::<T>(vsk), end) };
    }

    /// Calls `change` with the bound sockets that match, each with its lock; it changes them so that they do not any more.
    /// Sleeps.
    ///
    /// # Safety
    ///
    /// `matches` may be called with any valid socket, with its lock or that of the tables held.
    unsafe fn for_each_bound(
        matches: impl Fn(*mut bindings::vsock_sock) -> bool,
        change: impl Fn(&LockedSocket<'_>),
    ) {
        let table = &raw mut bindings::vsock_bind_table;
        // SAFETY: The table's last list has the sockets that are not bound.
        let lists = unsafe { (*table).len() } - 1;
        for list in 0..lists {
            loop {
                // SAFETY: It is one of the table's lists, linked by that field. The rest as the caller promises.
                let found = unsafe {
                    Self::some_of(
                        table.cast::<bindings::list_head>().add(list),
                        1,
                        offset_of!(bindings::vsock_sock, bound_table),
                        &matches,
                    )
                };
                for socket in found.iter().flatten() {
                    let socket = socket.lock();
                    if matches(socket.as_raw()) {
                        change(&socket);
                    }
                }
                // None of these is found again, unless it has come to match anew.
                if found.iter().any(Option::is_none) {
                    break;
                }
            }
        }
    }

    /// Whether a socket is bound to a CID that is the guest's, as no other CID can be bound to, but not its present one
    /// `cid`.
    ///
    /// # Safety
    ///
    /// `vsk` is valid, and its lock or that of the tables held.
    unsafe fn is_bound_to_other(vsk: *mut bindings::vsock_sock, cid: u32) -> bool {
        // SAFETY: As the caller promises. Who changes the address has both locks, but for the loopback transport, which has that
        // of the socket: so it is read as a whole.
        let bound = unsafe { ptr::read_volatile(&raw const (*vsk).local_addr.svm_cid) };
        bound != cid
            && bound != Address::CID_ANY
            && bound != bindings::VMADDR_CID_LOCAL
            && bound != bindings::VMADDR_CID_HOST
    }

    /// Whether a socket listens, or has no connection and is about to have one by transport `T` or none.
    ///
    /// # Safety
    ///
    /// `vsk` is valid, and a transport that is registered stays so: the caller has the device, which goes before that does.
    unsafe fn is_unconnected<T: Transport>(vsk: *mut bindings::vsock_sock) -> bool {
        // SAFETY: As the caller promises; the state is read atomically.
        match u32::from(unsafe { bindings::vsock_glue_state(vsk.cast()) }) {
            bindings::TCP_LISTEN | bindings::TCP_CLOSE => true,
            // SAFETY: As the caller promises.
            _ => unsafe { Self::is_connecting::<T>(vsk) },
        }
    }

    /// Whether transport `T` is connecting a socket.
    ///
    /// # Safety
    ///
    /// As for [`is_unconnected`](Self::is_unconnected).
    unsafe fn is_connecting<T: Transport>(vsk: *mut bindings::vsock_sock) -> bool {
        // SAFETY: As the caller promises; the state is read atomically. The pointer, which is compared only, is read as a whole;
        // it changes with the socket's lock, so without that it may be of the moment before.
        unsafe {
            u32::from(bindings::vsock_glue_state(vsk.cast())) == bindings::TCP_SYN_SENT
                && transport::is_ours::<T>(ptr::read_volatile(&raw const (*vsk).transport))
        }
    }

    /// References to some of the sockets in a table's lists that match: to all, where there are at most
    /// [`BATCH`].
    ///
    /// # Safety
    ///
    /// `first` is the first of `lists` lists that the lock of the tables protects, whose sockets are linked at
    /// `link_offset`. `matches` may be called with any of them and the lock held.
    unsafe fn some_of(
        first: *mut bindings::list_head,
        lists: usize,
        link_offset: usize,
        matches: impl Fn(*mut bindings::vsock_sock) -> bool,
    ) -> [Option<ARef<Self>>; BATCH] {
        let mut found = [const { None }; BATCH];
        let mut room = found.iter_mut();
        // SAFETY: The lock protects the lists, and their sockets from going away.
        unsafe {
            bindings::vsock_glue_table_lock();
            'lists: for list in 0..lists {
                let head = first.add(list);
                let mut at = (*head).next;
                while !ptr::eq(at, head) {
                    let vsk = at.byte_sub(link_offset).cast::<bindings::vsock_sock>();
                    if matches(vsk) {
                        let Some(place) = room.next() else {
                            break 'lists;
                        };
                        *place = Some(Self::from_raw(vsk).into());
                    }
                    at = (*at).next;
                }
            }
            bindings::vsock_glue_table_unlock();
        }
        found
    }

    /// Takes the socket's lock. Sleeps; not for callbacks that the core makes with the lock held.
    pub(crate) fn lock(&self) -> SocketGuard<'_> {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_lock_sock(self.as_sock()) };
        // SAFETY: It is held now, and `SocketGuard` releases it.
        SocketGuard(ManuallyDrop::new(unsafe {
            LockedSocket::assume_locked(self)
        }))
    }

    /// Takes the lock of a connection that is being made, with its listener's lock held.
    pub(crate) fn lock_child(&self) -> SocketGuard<'_> {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_lock_sock_child(self.as_sock()) };
        // SAFETY: It is held now, and `SocketGuard` releases it.
        SocketGuard(ManuallyDrop::new(unsafe {
            LockedSocket::assume_locked(self)
        }))
    }

    /// The kind of the socket.
    pub(crate) fn kind(&self) -> SocketKind {
        // SAFETY: By the type invariant. The type never changes.
        match u32::from(unsafe { (*self.as_sock()).sk_type }) {
            bindings::sock_type_SOCK_STREAM => SocketKind::Stream,
            bindings::sock_type_SOCK_SEQPACKET => SocketKind::SeqPacket,
            _ => SocketKind::Datagram,
        }
    }

    /// Whether the socket's namespace is in global mode, the only one that a guest's device serves.
    pub(crate) fn in_global_namespace(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_net_mode_global(self.as_raw()) }
    }

    /// Memory that the socket's packets to the device take, in bytes, whether it has them or they wait.
    pub(crate) fn send_memory(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_send_memory(self.as_sock()) }
    }

    /// Wakes those who wait for room to send.
    pub(crate) fn write_space(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_write_space(self.as_sock()) }
    }
}

/// A socket whose lock (`lock_sock()`) the current context holds.
///
/// # Invariants
///
/// The lock is held as long as this lives.
pub(crate) struct LockedSocket<'a> {
    socket: &'a Socket,
    // The lock belongs to the thread that took it.
    _not_send: PhantomData<*mut ()>,
}

impl Deref for LockedSocket<'_> {
    type Target = Socket;

    fn deref(&self) -> &Socket {
        self.socket
    }
}

/// Takes the lock away from a socket when it is dropped.
pub(crate) struct SocketGuard<'a>(ManuallyDrop<LockedSocket<'a>>);

impl<'a> Deref for SocketGuard<'a> {
    type Target = LockedSocket<'a>;

    fn deref(&self) -> &LockedSocket<'a> {
        &self.0
    }
}

impl DerefMut for SocketGuard<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Drop for SocketGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: The lock was taken when the guard was made.
        unsafe { bindings::vsock_glue_release_sock(self.0.as_sock()) }
    }
}

impl<'a> LockedSocket<'a> {
    /// Says that the lock is held.
    ///
    /// # Safety
    ///
    /// It is, and stays so while the result lives.
    pub(super) unsafe fn assume_locked(socket: &'a Socket) -> Self {
        Self {
            socket,
            _not_send: PhantomData,
        }
    }

    /// The connection state that transport `T` keeps for the socket; `None` where it is not `T`'s.
    pub(crate) fn connection<T: Transport>(&self) -> Option<ArcBorrow<'_, T::Connection>> {
        let vsk = self.as_raw();
        // SAFETY: Transport and its state change under the socket's lock only, or with the last reference.
        // They are changed by no function that takes a shared reference to `self`.
        unsafe {
            if !transport::is_ours::<T>((*vsk).transport) {
                return None;
            }
            transport::borrow_connection::<T>(vsk)
        }
    }

    /// The state.
    pub(crate) fn state(&self) -> SocketState {
        // SAFETY: By the type invariant.
        match u32::from(unsafe { bindings::vsock_glue_state(self.as_sock()) }) {
            bindings::TCP_ESTABLISHED => SocketState::Established,
            bindings::TCP_SYN_SENT => SocketState::Connecting,
            bindings::TCP_LISTEN => SocketState::Listening,
            bindings::TCP_CLOSING => SocketState::Closing,
            _ => SocketState::Closed,
        }
    }

    /// Changes the state.
    pub(crate) fn set_state(&self, state: SocketState) {
        let state = match state {
            SocketState::Closed => bindings::TCP_CLOSE,
            SocketState::Connecting => bindings::TCP_SYN_SENT,
            SocketState::Established => bindings::TCP_ESTABLISHED,
            SocketState::Closing => bindings::TCP_CLOSING,
            SocketState::Listening => bindings::TCP_LISTEN,
        };
        // SAFETY: By the type invariant. The states are small numbers.
        unsafe { bindings::vsock_glue_set_state(self.as_sock(), state as u8) }
    }

    /// Puts a connecting socket into the connected state: it, and the `struct socket` of its file.
    pub(crate) fn set_connected(&self) {
        self.set_state(SocketState::Established);
        // SAFETY: By the type invariant. The socket of a file is set and cleared with the lock held.
        unsafe { bindings::vsock_glue_set_socket_connected(self.as_sock()) }
    }

    /// The own address.
    pub(crate) fn local(&self) -> Address {
        // SAFETY: The lock is held.
        Address::from_raw(unsafe { &(*self.as_raw()).local_addr })
    }

    /// The peer's address.
    pub(crate) fn remote(&self) -> Address {
        // SAFETY: The lock is held.
        Address::from_raw(unsafe { &(*self.as_raw()).remote_addr })
    }

    /// Replaces both addresses of a socket that is in no table yet.
    pub(crate) fn set_addresses(&self, local: Address, remote: Address) {
        // SAFETY: The lock is held.
        unsafe {
            (*self.as_raw()).local_addr = local.to_raw();
            (*self.as_raw()).remote_addr = remote.to_raw();
        }
    }

    /// Gives the socket, which has no connection, the CID `new` where it is bound to one that the guest had before. Takes
    /// `vsock_table_lock` then; process context.
    pub(crate) fn change_own_cid(&self, new: u32) {
        let vsk = self.as_raw();
        // SAFETY: The lock is held, and for a change that of the tables, too, whose readers compare addresses. The hash of an
        // address is that of its port alone, so that the socket stays in its list.
        unsafe {
            if Socket::is_bound_to_other(vsk, new) {
                bindings::vsock_glue_table_lock();
                (*vsk).local_addr.svm_cid = new;
                bindings::vsock_glue_table_unlock();
            }
        }
    }

    /// Gives a connected socket another CID of its own and of its peer. In between nobody finds it.
    pub(crate) fn change_cids(&self, own: u32, peer: u32) {
        let vsk = self.as_raw();
        // SAFETY: The lock is held, and for the own address that of the tables, too: its readers compare addresses of
        // bound sockets, whose place depends on the port alone. The place of a connected socket depends on the peer's
        // CID, so it leaves the table, which gives up a reference that is not the last, and comes back.
        unsafe {
            bindings::vsock_remove_connected(vsk);
            bindings::vsock_glue_table_lock();
            (*vsk).local_addr.svm_cid = own;
            (*vsk).remote_addr.svm_cid = peer;
            bindings::vsock_glue_table_unlock();
            bindings::vsock_insert_connected(vsk);
        }
    }

    /// Whether another socket has a connection between the same ports and CIDs. Takes `vsock_table_lock`; process context.
    pub(crate) fn has_successor(&self) -> bool {
        Socket::find_connected(self.remote(), self.local())
            .is_some_and(|found| !ptr::eq(found.as_raw(), self.as_raw()))
    }

    /// Whether a packet from `source` is for this socket: it is `T`'s, and `source` its peer.
    pub(crate) fn accepts_source<T: Transport>(&self, source: Address) -> bool {
        let vsk = self.as_raw();
        // SAFETY: The lock is held.
        unsafe { transport::is_ours::<T>((*vsk).transport) && self.remote() == source }
    }

    /// Size of the receive buffer that the application asked for, in bytes.
    pub(crate) fn buffer_size(&self) -> u64 {
        // SAFETY: The lock is held.
        unsafe { (*self.as_raw()).buffer_size }
    }

    /// Limits the size of the receive buffer.
    pub(crate) fn limit_buffer_size(&self, limit: u64) {
        // SAFETY: The lock is held.
        unsafe {
            let size = &raw mut (*self.as_raw()).buffer_size;
            *size = (*size).min(limit);
        }
    }

    /// The directions that the application has shut down.
    pub(crate) fn shutdown(&self) -> Directions {
        // SAFETY: The lock is held.
        Directions::from_bits(u32::from(unsafe { (*self.as_sock()).sk_shutdown }))
    }

    /// Shuts down directions on the application's behalf.
    pub(crate) fn set_shutdown(&self, directions: Directions) {
        // SAFETY: The lock is held. Both directions fit.
        unsafe { (*self.as_sock()).sk_shutdown = directions.0 as u8 }
    }

    /// The directions that the peer has shut down.
    pub(crate) fn peer_shutdown(&self) -> Directions {
        // SAFETY: The lock is held.
        Directions::from_bits(unsafe { (*self.as_raw()).peer_shutdown })
    }

    /// Notes what the peer has shut down.
    pub(crate) fn set_peer_shutdown(&self, directions: Directions) {
        // SAFETY: The lock is held; poll of datagram sockets, which reads without it, is for others.
        unsafe { ptr::write_volatile(&raw mut (*self.as_raw()).peer_shutdown, directions.0) }
    }

    /// Whether the connection has come to its end (`SOCK_DONE`).
    pub(crate) fn is_done(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_flag(self.as_sock(), bindings::sock_flags_SOCK_DONE) }
    }

    /// Says that the connection has come to its end.
    pub(crate) fn set_done(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_set_flag(self.as_sock(), bindings::sock_flags_SOCK_DONE) }
    }

    /// Forgets how far a connection was shut down and that it had ended, for the next one.
    pub(crate) fn begin_anew(&self) {
        self.set_shutdown(Directions::NONE);
        self.set_peer_shutdown(Directions::NONE);
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_reset_flag(self.as_sock(), bindings::sock_flags_SOCK_DONE) }
    }

    /// Whether the application has asked for completions of sends with `MSG_ZEROCOPY`.
    pub(crate) fn wants_zero_copy(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_flag(self.as_sock(), bindings::sock_flags_SOCK_ZEROCOPY) }
    }

    /// Sets the socket's error and wakes everybody who waits for the socket.
    pub(crate) fn fail(&self, error: Error) {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_error_report(self.as_sock(), -error.to_errno()) }
    }

    /// Takes the socket's error away and returns whether there was one.
    pub(crate) fn take_error(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_take_error(self.as_sock()) != 0 }
    }

    /// Whether the socket has an error that nobody has asked for.
    pub(crate) fn has_error(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_has_error(self.as_sock()) }
    }

    /// How many calls sleep that receive. Those that were woken and wait for the lock do not count.
    pub(crate) fn blocked_readers(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_blocked_readers(self.as_sock()) }
    }

    /// How many calls sleep that send, or were woken and wait for the lock.
    pub(crate) fn blocked_writers(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_blocked_writers(self.as_sock()) }
    }

    /// Wakes those who wait for a change of state.
    pub(crate) fn state_change(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_state_change(self.as_sock()) }
    }

    /// Wakes readers, where there is as much as they wait for.
    pub(crate) fn wake_readers(&self) {
        // SAFETY: The lock is held, and the socket has a transport.
        unsafe { bindings::vsock_data_ready(self.as_sock()) }
    }

    /// Wakes those who wait for a message, or to accept a connection.
    pub(crate) fn data_ready(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_data_ready(self.as_sock()) }
    }

    /// How many bytes a reader waits for (`SO_RCVLOWAT`), at least one.
    pub(crate) fn low_water(&self) -> u32 {
        // SAFETY: By the type invariant. The option is never negative.
        unsafe { bindings::vsock_glue_rcvlowat(self.as_sock()) }
            .unsigned_abs()
            .max(1)
    }

    /// Whether the listener has as many unaccepted connections as it wants.
    pub(crate) fn accept_queue_is_full(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_accept_queue_is_full(self.as_sock()) }
    }

    /// Makes a socket for a connection to this listener.
    pub(crate) fn create_child(&self) -> Option<ARef<Socket>> {
        // SAFETY: The listener is locked; the function returns a reference.
        unsafe { Socket::take(bindings::vsock_create_connected(self.as_sock())) }
    }

    /// Gives a new connection of `listener` the transport that its addresses call for, `T` or none.
    pub(crate) fn assign_transport<T: Transport>(&mut self, listener: &LockedSocket<'_>) -> Result {
        // SAFETY: Both are locked; `self` is borrowed mutably, so nobody has its connection state.
        to_result(unsafe { bindings::vsock_assign_transport(self.as_raw(), listener.as_raw()) })?;
        if self.connection::<T>().is_none() {
            return Err(ENODEV);
        }
        Ok(())
    }

    /// Puts a connection into the listener's queue for accept(2), unless it is in one.
    pub(crate) fn enqueue_accept(&self, child: &LockedSocket<'_>) {
        // SAFETY: Both are locked, as is whoever else puts it into a queue.
        if unsafe { is_listed(&raw const (*child.as_raw()).accept_queue) } {
            return;
        }
        // The reference of the file that accept(2) will make; the core drops it when that is closed.
        child.inc_ref();
        // SAFETY: Both are locked, and the child is in no queue; the function takes the queue's references.
        unsafe { bindings::vsock_enqueue_accept(self.as_sock(), child.as_sock()) }
    }

    /// Puts the socket into the table of connected sockets, unless it is there. Takes `vsock_table_lock`; process context.
    pub(crate) fn insert_connected(&self) {
        // SAFETY: The lock is held, by which all put sockets there and take them out, so that it is not there twice; the function
        // takes its own reference.
        unsafe {
            if !is_listed(&raw const (*self.as_raw()).connected_table) {
                bindings::vsock_insert_connected(self.as_raw());
            }
        }
    }

    /// Takes the socket out of the table of connected sockets and, where it was closed, of bound ones. Takes
    /// `vsock_table_lock`; process context.
    pub(crate) fn remove_from_tables(&self) {
        // SAFETY: The lock is held, and our caller has a reference besides those of the tables.
        unsafe { bindings::vsock_remove_sock(self.as_raw()) }
    }

    /// Waits for sent data to leave, as `SO_LINGER` says. Releases the lock and takes it again meanwhile.
    pub(crate) fn linger(&mut self) {
        // SAFETY: The socket is locked, in process context. Its wait queue is there: a socket with SOCK_LINGER is one of an
        // application, whom others make vsock_linger() return at once.
        unsafe {
            if !bindings::vsock_glue_current_is_exiting() {
                bindings::vsock_linger(self.as_sock());
            }
        }
    }

    /// Lets [`Transport::close_timeout`] be called in `jiffies`, unless it is cancelled.
    pub(crate) fn schedule_close<T: Transport>(&self, queue: &OwnedQueue, jiffies: usize) {
        let vsk = self.as_raw();
        self.socket.inc_ref();
        // SAFETY: The lock is held. The work owns the reference that was taken, until it has run or is
        // cancelled. No such work is scheduled yet: a socket that is connected or disconnecting is released
        // once, by the last close(), because connect() gives no such socket to another transport.
        unsafe {
            bindings::vsock_glue_init_close_work(vsk, Some(close_timeout::<T>));
            (*vsk).close_work_scheduled = true;
            bindings::queue_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                queue.as_raw(),
                &raw mut (*vsk).close_work,
                jiffies,
            );
        }
    }

    /// Whether [`Transport::close_timeout`] is still to be called.
    pub(crate) fn close_is_scheduled(&self) -> bool {
        // SAFETY: The lock is held.
        unsafe { (*self.as_raw()).close_work_scheduled }
    }

    /// Takes the close timeout back; `false` where there is none or it has begun to run.
    pub(crate) fn cancel_close(&self) -> bool {
        let vsk = self.as_raw();
        // SAFETY: The lock is held; where the flag is set the work is initialised. A cancelled work's
        // reference is ours to drop; our caller has another one.
        unsafe {
            if !(*vsk).close_work_scheduled
                || !bindings::cancel_delayed_work(&raw mut (*vsk).close_work)
            {
                return false;
            }
            (*vsk).close_work_scheduled = false;
            bindings::vsock_glue_sock_put(self.as_sock());
        }
        true
    }
}

/// Runs when a closed socket's peer has not answered in time.
extern "C" fn close_timeout<T: Transport>(work: *mut bindings::work_struct) {
    // SAFETY: The work is that of `vsock_sock::close_work`, and owns a reference.
    let socket: ARef<Socket> = unsafe {
        let vsk = work
            .byte_sub(offset_of!(bindings::delayed_work, work))
            .byte_sub(offset_of!(bindings::vsock_sock, close_work))
            .cast::<Socket>();
        ARef::from_raw(NonNull::new_unchecked(vsk))
    };
    {
        let locked = socket.lock();
        // SAFETY: The transport stays registered while it has sockets.
        if let Some(context) = unsafe { transport::context::<T>() } {
            context.close_timeout(&locked);
        }
        // SAFETY: The lock is held.
        unsafe { (*locked.as_raw()).close_work_scheduled = false };
    }
}
