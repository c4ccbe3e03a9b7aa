// SPDX-License-Identifier: GPL-2.0

//! Socket buffers with one owner.
//!
//! C header: [`include/linux/skbuff.h`](srctree/include/linux/skbuff.h)

use super::{
    bindings,
    errno::ENOTCONN,
    message::{MessageDest, MessageSource, ZeroCopy},
    socket::Socket,
};
use core::{
    iter,
    marker::PhantomData,
    mem::ManuallyDrop,
    ops::{ControlFlow, Deref},
    ptr,
    ptr::NonNull,
    sync::atomic::{compiler_fence, Ordering}, //
};
use kernel::{alloc::AllocError, error::to_result, ffi::c_int, prelude::*};

/// Size of `skb->cb`, the room that a buffer has for its owner's use.
const CB_SIZE: usize = 48;

/// Which way the data of a buffer goes.
pub(crate) trait Direction {
    /// From the driver to the device.
    const TO_DEVICE: bool;
}

/// To the device, which never writes to the buffer.
pub(crate) enum ToDevice {}

impl Direction for ToDevice {
    const TO_DEVICE: bool = true;
}

/// From the device.
pub(crate) enum FromDevice {}

impl Direction for FromDevice {
    const TO_DEVICE: bool = false;
}

/// What a control block is, which says of its buffer which way the data goes.
pub(crate) trait Control {
    /// Which way. It stays so for as long as the buffer lives, whatever control blocks it has in turn.
    type Direction: Direction;
}

/// A buffer of which nothing but its data is known.
impl Control for () {
    type Direction = FromDevice;
}

/// A buffer that had a packet to the device, and has none now: [`SkBuff::recycle_sent`] alone makes it.
pub(crate) struct Blank(());

impl Control for Blank {
    type Direction = ToDevice;
}

/// An owned `struct sk_buff` whose control block (`cb`) holds a `C`.
///
/// # Invariants
///
/// - The pointer is a buffer that nobody else refers to, and that is on no list. Its data is nobody else's, for it is never cloned.
/// - Its control block holds a valid `C`, which is dropped with the buffer.
/// - It was made for the [direction](Control::Direction) that `C` says: a device writes to no other buffers than those from it,
///   and only those to it have fragments.
pub(crate) struct SkBuff<C> {
    skb: NonNull<bindings::sk_buff>,
    _control: PhantomData<C>,
}

// SAFETY: A buffer is not bound to a thread; what is in its control block goes along.
unsafe impl<C: Send> Send for SkBuff<C> {}

/// What an outgoing packet carries behind its header.
pub(crate) enum Payload<'a> {
    /// Nothing.
    None,
    /// A copy of so many bytes of a message, in that buffer where it fits.
    Copy(&'a mut MessageSource, usize, Option<SkBuff<Blank>>),
    /// So many bytes of a message in the caller's own pages.
    Pages(&'a mut MessageSource, usize),
}

impl<C> SkBuff<C> {
    const CONTROL_FITS: () = assert!(size_of::<C>() <= CB_SIZE && align_of::<C>() <= 8);

    /// Takes a new buffer over, with `control` in its control block.
    ///
    /// # Safety
    ///
    /// `skb` is a buffer with one reference, which the caller gives away, made for the direction that `C` says.
    unsafe fn new(skb: NonNull<bindings::sk_buff>, control: C) -> Self {
        let () = Self::CONTROL_FITS;
        // SAFETY: The control block is in the buffer, large and aligned enough (it begins 8-aligned in
        // `struct sk_buff`), and free for the buffer's owner.
        unsafe { (&raw mut (*skb.as_ptr()).cb).cast::<C>().write(control) };
        // INVARIANT: As promised, and written.
        Self {
            skb,
            _control: PhantomData,
        }
    }

    /// Gives the buffer to C.
    pub(super) fn into_raw(self) -> *mut bindings::sk_buff {
        ManuallyDrop::new(self).as_raw()
    }

    /// Takes a buffer back from C.
    ///
    /// # Safety
    ///
    /// It comes from [`Self::into_raw`] of the same `C`, and nobody else has or takes it.
    pub(super) unsafe fn from_raw(skb: NonNull<bindings::sk_buff>) -> Self {
        // INVARIANT: As at `into_raw()`.
        Self {
            skb,
            _control: PhantomData,
        }
    }

    /// The C buffer.
    pub(super) fn as_raw(&self) -> *mut bindings::sk_buff {
        self.skb.as_ptr()
    }

    fn control_ptr(&self) -> *mut C {
        // SAFETY: The buffer is valid.
        unsafe { (&raw mut (*self.as_raw()).cb).cast() }
    }

    /// What is in the control block.
    pub(crate) fn control(&self) -> &C {
        // SAFETY: By the type invariant.
        unsafe { &*self.control_ptr() }
    }

    /// What is in the control block.
    pub(crate) fn control_mut(&mut self) -> &mut C {
        // SAFETY: By the type invariant, and `self` is borrowed mutably.
        unsafe { &mut *self.control_ptr() }
    }

    /// Bytes of data.
    pub(crate) fn len(&self) -> usize {
        // SAFETY: The buffer is valid.
        unsafe { (*self.as_raw()).len as usize }
    }

    /// Bytes of memory that the buffer takes, its bookkeeping included.
    pub(crate) fn truesize(&self) -> usize {
        // SAFETY: The buffer is valid.
        unsafe { (*self.as_raw()).truesize as usize }
    }

    /// Bytes that can be appended.
    pub(crate) fn tailroom(&self) -> usize {
        // SAFETY: The buffer is valid.
        unsafe { bindings::vsock_glue_tailroom(self.as_raw()) as usize }
    }

    /// Copies as much of the data as fits into `to` and returns that.
    pub(crate) fn copy_into<'a>(&self, to: &'a mut [u8]) -> &'a [u8] {
        let len = self.len().min(to.len());
        // SAFETY: `to` has room for `len` bytes, and the buffer has as many.
        let copied = to_result(unsafe {
            bindings::skb_copy_bits(self.as_raw(), 0, to.as_mut_ptr().cast(), len as c_int)
        });
        let (data, _) = to.split_at(if copied.is_ok() { len } else { 0 });
        data
    }

    /// Frees a buffer that has served its purpose (dropping one says that it was lost).
    pub(crate) fn consume(self) {
        // SAFETY: The control block is dropped here and nowhere else.
        unsafe { ptr::drop_in_place(self.control_ptr()) };
        // SAFETY: The reference is given away.
        unsafe { bindings::consume_skb(ManuallyDrop::new(self).as_raw()) }
    }
}

impl<C: Control> SkBuff<C> {
    /// Replaces the control block.
    pub(crate) fn with_control<D: Control<Direction = C::Direction>>(
        self,
        control: D,
    ) -> SkBuff<D> {
        let skb = self.skb;
        // SAFETY: The old control block is dropped here and nowhere else: `self` is not dropped below.
        unsafe { ptr::drop_in_place(self.control_ptr()) };
        let _ = ManuallyDrop::new(self);
        // SAFETY: The reference is `self`'s, and the direction the same.
        unsafe { SkBuff::new(skb, control) }
    }
}

impl SkBuff<Blank> {
    /// Returns it where it is what would be made for `linear` bytes in one segment and `pages` bytes in others; frees it otherwise.
    fn if_made_for(self, linear: u32, pages: u32) -> Option<Self> {
        // SAFETY: The buffer is valid.
        if unsafe { bindings::vsock_glue_is_made_for(self.as_raw(), linear, pages) } {
            return Some(self);
        }
        self.consume();
        None
    }
}

impl<C: Control<Direction = ToDevice>> SkBuff<C> {
    /// The longest packet that is one segment of memory, in bytes.
    pub(crate) fn longest_linear() -> usize {
        // SAFETY: No preconditions.
        unsafe { bindings::vsock_glue_largest_linear() as usize }
    }

    /// Makes a packet of `header` and `payload`, filled and ready to send. May sleep.
    ///
    /// It is charged to `socket`'s send memory, and keeps the socket alive as long as it lives. A completion
    /// for `MSG_ZEROCOPY` is attached to it, also where the payload is a copy.
    ///
    /// # Errors
    ///
    /// ENOMEM; EFAULT where the message cannot be read; EMSGSIZE where its pages are too many for a packet; EINVAL where there
    /// are pages but no socket to charge them to, or no completion that holds them. The message is then as before.
    pub(crate) fn outgoing(
        socket: Option<&Socket>,
        header: &[u8],
        mut payload: Payload<'_>,
        zero_copy: Option<&mut ZeroCopy>,
        control: C,
    ) -> Result<Self> {
        if matches!(payload, Payload::Pages(..)) && (socket.is_none() || zero_copy.is_none()) {
            return Err(EINVAL);
        }
        let (in_buffer, in_pages) = match &payload {
            Payload::Copy(_, len, _) if header.len() + len <= Self::longest_linear() => (*len, 0),
            Payload::Copy(_, len, _) => (0, *len),
            Payload::None | Payload::Pages(..) => (0, 0),
        };
        let linear = u32::try_from(header.len() + in_buffer)?;
        let pages = u32::try_from(in_pages)?;
        let blank = match &mut payload {
            Payload::Copy(_, _, blank) => blank.take(),
            Payload::None | Payload::Pages(..) => None,
        };
        let blank = blank.and_then(|blank| blank.if_made_for(linear, pages));
        let skb = match blank {
            Some(blank) => blank.into_raw(),
            // SAFETY: No preconditions.
            None if pages > 0 => unsafe { bindings::vsock_glue_alloc_with_frags(linear, pages) },
            // SAFETY: No preconditions.
            None => unsafe { bindings::vsock_glue_alloc_linear(linear) },
        };
        let skb = NonNull::new(skb).ok_or(ENOMEM)?;
        // SAFETY: It was made here, to be sent, or is a blank one, which has nothing in its control block.
        let mut this = unsafe { Self::new(skb, control) };
        if let Some(socket) = socket {
            // SAFETY: Both are valid, and the buffer has no owner yet.
            unsafe { bindings::vsock_glue_set_owner(this.as_raw(), socket.as_sock()) }
        }
        this.put_header(header, in_pages == 0);
        if let Some(zero_copy) = zero_copy {
            zero_copy.attach(this.as_raw());
        }
        match payload {
            Payload::None => {}
            Payload::Copy(message, len, _) => {
                if in_buffer > 0 {
                    // SAFETY: The buffer was made with room for the payload.
                    unsafe { bindings::skb_put(this.as_raw(), len as u32) };
                }
                this.fill(message, |skb, message| {
                    // SAFETY: The buffer has `len` bytes behind the header; the iterator can be read.
                    unsafe {
                        bindings::skb_copy_datagram_from_iter(
                            skb,
                            header.len() as c_int,
                            message.iter(),
                            len as c_int,
                        )
                    }
                })?;
            }
            Payload::Pages(message, len) => {
                this.fill(message, |skb, message| {
                    // SAFETY: The buffer has an owner and a completion, which holds the pages: that was seen to above.
                    unsafe {
                        bindings::__zerocopy_sg_from_iter(
                            message.as_raw(),
                            ptr::null_mut(),
                            skb,
                            message.iter(),
                            len,
                            ptr::null_mut(),
                        )
                    }
                })?;
            }
        }
        Ok(this)
    }

    /// Makes a packet of a header alone, like [`outgoing`](Self::outgoing), and waits for memory until there is some.
    /// Sleeps.
    pub(crate) fn outgoing_nofail<const N: usize>(
        socket: Option<&Socket>,
        header: &[u8; N],
        control: C,
    ) -> Self {
        // SAFETY: No preconditions; with this the function does not return null, but a new buffer, to be sent.
        let mut this = unsafe {
            let skb = bindings::vsock_glue_alloc_linear_nofail(N as u32);
            Self::new(NonNull::new_unchecked(skb), control)
        };
        if let Some(socket) = socket {
            // SAFETY: Both are valid, and the buffer has no owner yet.
            unsafe { bindings::vsock_glue_set_owner(this.as_raw(), socket.as_sock()) }
        }
        this.put_header(header, true);
        this
    }

    /// Takes the packet out of its buffer, which is charged to no socket any more; its memory stays as it is. The buffer is freed,
    /// as [`consume`](Self::consume) does it, where it has pages or a completion of a program's, or was made when memory was short
    /// or in pieces.
    pub(crate) fn recycle_sent(self) -> Option<SkBuff<Blank>> {
        let this = self.with_control(Blank(()));
        // SAFETY: The buffer is valid and nobody else's.
        match unsafe { bindings::vsock_glue_recycle_sent(this.as_raw()) } {
            true => Some(this),
            false => {
                this.consume();
                None
            }
        }
    }

    /// Puts the header into the linear part of a buffer that was made with room for it.
    fn put_header(&mut self, header: &[u8], linear: bool) {
        let skb = self.as_raw();
        // SAFETY: The linear part has room for the header. `skb_put()` wants a buffer without fragments:
        // where there are some, the header goes in by hand, in front of them, as `skb_put()` would do it.
        unsafe {
            let to = if linear {
                bindings::skb_put(skb, header.len() as u32).cast::<u8>()
            } else {
                let to = (*skb).data;
                (*skb).tail += header.len() as bindings::sk_buff_data_t;
                (*skb).len += header.len() as u32;
                to
            };
            ptr::copy_nonoverlapping(header.as_ptr(), to, header.len());
        }
    }

    /// Lets `fill` take bytes of `message`, which is put back where that fails.
    fn fill(
        &mut self,
        message: &mut MessageSource,
        fill: impl FnOnce(*mut bindings::sk_buff, &mut MessageSource) -> c_int,
    ) -> Result {
        let before = message.position();
        let filled = to_result(fill(self.as_raw(), message));
        if filled.is_err() {
            message.rewind(before);
        }
        filled
    }

    /// The first `N` bytes; `None` where there are fewer in one piece.
    pub(crate) fn front<const N: usize>(&self) -> Option<&[u8; N]> {
        let skb = self.as_raw();
        // SAFETY: The buffer is valid and ours, its linear part as long as asked for, and no device writes to it by the type
        // invariant.
        unsafe {
            ((*skb).len - (*skb).data_len >= N as u32).then(|| &*(*skb).data.cast::<[u8; N]>())
        }
    }

    /// The first `N` bytes; `None` where there are fewer in one piece.
    pub(crate) fn front_mut<const N: usize>(&mut self) -> Option<&mut [u8; N]> {
        let skb = self.as_raw();
        // SAFETY: As above, and `self` is borrowed mutably. Nobody shares the data: it was never cloned.
        unsafe {
            ((*skb).len - (*skb).data_len >= N as u32).then(|| &mut *(*skb).data.cast::<[u8; N]>())
        }
    }
}

impl<C: Control<Direction = FromDevice>> SkBuff<C> {
    /// Makes an empty buffer that takes 4 KiB of memory with its bookkeeping, and whose first `N` bytes are zero until something
    /// is written there. May sleep.
    pub(crate) fn page_sized<const N: usize>(control: C) -> Result<Self, AllocError> {
        // SAFETY: No preconditions.
        let this = Self::empty(unsafe { bindings::vsock_glue_page_sized() }, control)?;
        let zeroed = N.min(this.tailroom());
        // SAFETY: The buffer has no data yet, and so much room behind that.
        unsafe { (*this.as_raw()).data.write_bytes(0, zeroed) };
        Ok(this)
    }

    /// Memory of such a buffer with all of its bookkeeping, in bytes.
    pub(crate) fn page_truesize() -> usize {
        // SAFETY: No preconditions.
        unsafe { bindings::vsock_glue_page_truesize() as usize }
    }

    /// Makes an empty buffer with room for `size` bytes. May sleep.
    pub(crate) fn empty(size: u32, control: C) -> Result<Self, AllocError> {
        // SAFETY: No preconditions.
        let skb = unsafe { bindings::vsock_glue_alloc_linear(size) };
        let skb = NonNull::new(skb).ok_or(AllocError)?;
        // SAFETY: It was made here.
        Ok(unsafe { Self::new(skb, control) })
    }

    /// Makes it as empty as a new one, charged to no socket. What was in its memory stays there, but for what was taken off the
    /// front: the device wrote that. Needs the lock of the socket that it is charged to, where it is.
    pub(crate) fn recycle_received(self) -> SkBuff<()> {
        let this = self.with_control(());
        // SAFETY: The buffer is linear and nobody else has a part of it, by the type invariants; the socket that it is charged to
        // lives as long as the charge.
        unsafe { bindings::vsock_glue_recycle_received(this.as_raw()) };
        this
    }

    /// Declares the first `len` bytes of the tailroom to be data: a device wrote them.
    ///
    /// Returns `false` and changes nothing where the tailroom is smaller.
    pub(super) fn set_received(&mut self, len: usize) -> bool {
        if len > self.tailroom() {
            return false;
        }
        // SAFETY: There is room.
        unsafe { bindings::skb_put(self.as_raw(), len as u32) };
        true
    }

    /// The first `N` bytes, at least one, read once, and zeroed where they were; `None` where there are fewer.
    ///
    /// Before that a byte of each page of the data is written, to what it is: a hypervisor that copies the guest's memory to
    /// another host learns from that that the pages have changed, which it may not have from the device.
    pub(crate) fn take_front<const N: usize>(&mut self) -> Option<[u8; N]> {
        // The smallest pages that are copied; larger ones have changed with any of them.
        const PAGE: usize = 4096;
        const { assert!(N > 0) };
        let len = self.len();
        if len < N {
            return None;
        }
        let mut front = [0; N];
        // SAFETY: The buffer has `len` bytes of data, at least `N`, all of it linear and ours to write by the type invariant. A device
        // that breaks the rules may write there, too, so there are no references to it.
        unsafe {
            let data = (*self.as_raw()).data;
            let second_page = PAGE - data.addr() % PAGE;
            for at in Iterator::chain(iter::once(0), (second_page..len).step_by(PAGE)) {
                let byte = data.add(at);
                byte.write_volatile(byte.read_volatile());
            }
            // A volatile read of the whole is one for each byte. The fences see to it that this is behind the writes, and that the
            // copy is what is looked at from here on.
            compiler_fence(Ordering::SeqCst);
            ptr::copy_nonoverlapping(data, front.as_mut_ptr(), N);
            compiler_fence(Ordering::SeqCst);
            data.write_bytes(0, N);
        }
        Some(front)
    }

    /// Cuts `len` bytes off the front, at most all of them.
    pub(crate) fn pull(&mut self, len: usize) {
        let len = len.min(self.len());
        // SAFETY: There is so much data, all of it linear by the type invariant.
        unsafe { bindings::skb_pull(self.as_raw(), len as u32) };
    }

    /// Cuts the data to `len` bytes, where it is longer.
    pub(crate) fn truncate(&mut self, len: usize) {
        // SAFETY: The function does nothing where the data is not longer.
        unsafe { bindings::skb_trim(self.as_raw(), len.min(self.len()) as u32) };
    }

    /// Appends all data of `other`; returns `false` and does nothing where there is no room for it.
    pub(crate) fn append<D>(&mut self, other: &SkBuff<D>) -> bool {
        let len = other.len();
        if len > self.tailroom() {
            return false;
        }
        // SAFETY: There is room for `len` bytes behind the data, all of it linear by the type invariant, and `other` has as many.
        unsafe {
            let to = bindings::skb_put(self.as_raw(), len as u32);
            to_result(bindings::skb_copy_bits(other.as_raw(), 0, to, len as c_int)).is_ok()
        }
    }

    /// Copies `len` bytes from `offset` on into a message. May sleep.
    pub(crate) fn copy_to(&self, offset: usize, message: &mut MessageDest, len: usize) -> Result {
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(EINVAL);
        }
        // SAFETY: The buffer has so much data, and the iterator can be written.
        to_result(unsafe {
            bindings::skb_copy_datagram_iter(
                self.as_raw(),
                offset as c_int,
                message.iter(),
                len as c_int,
            )
        })
    }

    /// Charges the buffer's memory to a socket's receive memory until it is freed or [discharged](Self::discharge).
    /// Callable in atomic context.
    ///
    /// It does not keep the socket alive: the buffer has to be where the transport's `free_received()` finds it.
    pub(crate) fn charge_as_received(&self, socket: &Socket) {
        // SAFETY: Both are valid, and `destruct()` has charged buffers freed before the socket goes away.
        unsafe { bindings::vsock_glue_set_receiver(self.as_raw(), socket.as_sock()) }
    }

    /// Counts `size` more bytes as memory that the buffer takes, and charges them as the buffer itself is. Callable in atomic context.
    pub(crate) fn charge_more(&mut self, size: usize) {
        // Nothing that belongs to a buffer is longer.
        let size = size.min(c_int::MAX as usize) as c_int;
        // SAFETY: The buffer is valid and nobody else's; the socket that it is charged to lives as long as the charge.
        unsafe { bindings::vsock_glue_charge_more(self.as_raw(), size) }
    }

    /// Makes a socket the buffer's owner, to which it has a reference from now on. ENOTCONN where nobody else has one. Callable in
    /// atomic context.
    pub(super) fn set_owner_with_reference(&self, socket: &Socket) -> Result {
        // SAFETY: Both are valid, and the buffer nobody else's.
        match unsafe { bindings::vsock_glue_set_owner_sk(self.as_raw(), socket.as_sock()) } {
            true => Ok(()),
            false => Err(ENOTCONN.into()),
        }
    }

    /// Ends the charge of the buffer's memory to a socket.
    pub(crate) fn discharge(&mut self) {
        // SAFETY: The buffer is valid and nobody else's.
        unsafe { bindings::vsock_glue_orphan(self.as_raw()) }
    }
}

impl<C> Drop for SkBuff<C> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, and it is not used after this.
        unsafe { ptr::drop_in_place(self.control_ptr()) };
        // SAFETY: The reference is given away.
        unsafe {
            bindings::sk_skb_reason_drop(
                ptr::null(),
                self.as_raw(),
                bindings::skb_drop_reason_SKB_DROP_REASON_NOT_SPECIFIED,
            )
        }
    }
}

/// Whether the kernel is told to write over memory when it is freed (`init_on_free=1`, `page_poison=1`).
pub(crate) fn wipes_freed_memory() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::vsock_glue_wipes_freed_memory() }
}

/// A queue of buffers, linked through the buffers themselves: nothing is allocated.
///
/// It has no lock; whoever shares it brings one.
///
/// # Invariants
///
/// `head` is null or the first of a list linked by `next` and ended by null, which ends with `tail` and has
/// `len` buffers. The queue owns them.
pub(crate) struct SkBuffQueue<C> {
    head: *mut bindings::sk_buff,
    tail: *mut bindings::sk_buff,
    len: usize,
    _buffers: PhantomData<SkBuff<C>>,
}

// SAFETY: The queue is but a list of buffers.
unsafe impl<C: Send> Send for SkBuffQueue<C> {}

/// The link of a buffer.
///
/// # Safety
///
/// `skb` is valid.
unsafe fn next_of(skb: *mut bindings::sk_buff) -> *mut *mut bindings::sk_buff {
    // SAFETY: The buffer is valid; all readings of the union are plain pointers.
    unsafe { &raw mut (*skb).__bindgen_anon_1.__bindgen_anon_1.next }
}

/// A buffer that is in a queue, and stays there.
///
/// # Invariants
///
/// The queue is borrowed for `'a`, and nobody else has this buffer of it meanwhile.
pub(crate) struct QueuedSkBuff<'a, C> {
    // Not dropped, for the queue owns it; nor given away mutably, which would let it be replaced.
    skb: ManuallyDrop<SkBuff<C>>,
    _queue: PhantomData<&'a mut SkBuffQueue<C>>,
}

impl<C> QueuedSkBuff<'_, C> {
    /// # Safety
    ///
    /// `skb` is in a queue that is borrowed mutably for the lifetime, and nobody else has it.
    unsafe fn new(skb: NonNull<bindings::sk_buff>) -> Self {
        // INVARIANT: As the caller promises.
        Self {
            // SAFETY: It went in by `into_raw()`; it is not dropped here.
            skb: ManuallyDrop::new(unsafe { SkBuff::from_raw(skb) }),
            _queue: PhantomData,
        }
    }

    /// As [`SkBuff::control_mut`].
    pub(crate) fn control_mut(&mut self) -> &mut C {
        self.skb.control_mut()
    }
}

impl<C: Control<Direction = FromDevice>> QueuedSkBuff<'_, C> {
    /// As [`SkBuff::append`].
    pub(crate) fn append<D>(&mut self, other: &SkBuff<D>) -> bool {
        self.skb.append(other)
    }

    /// As [`SkBuff::charge_more`].
    pub(crate) fn charge_more(&mut self, size: usize) {
        self.skb.charge_more(size);
    }
}

impl<C> Deref for QueuedSkBuff<'_, C> {
    type Target = SkBuff<C>;

    fn deref(&self) -> &SkBuff<C> {
        &self.skb
    }
}

impl<C> SkBuffQueue<C> {
    /// An empty queue.
    pub(crate) const fn new() -> Self {
        Self {
            head: ptr::null_mut(),
            tail: ptr::null_mut(),
            len: 0,
            _buffers: PhantomData,
        }
    }

    /// How many buffers are in it.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.head.is_null()
    }

    /// Appends a buffer.
    pub(crate) fn push_back(&mut self, skb: SkBuff<C>) {
        let skb = skb.into_raw();
        // SAFETY: The buffer is valid and on no list; so is the tail, where there is one.
        unsafe {
            *next_of(skb) = ptr::null_mut();
            if self.tail.is_null() {
                self.head = skb;
            } else {
                *next_of(self.tail) = skb;
            }
        }
        self.tail = skb;
        self.len += 1;
    }

    /// Puts a buffer in front of all others.
    pub(crate) fn push_front(&mut self, skb: SkBuff<C>) {
        let skb = skb.into_raw();
        // SAFETY: The buffer is valid and on no list.
        unsafe { *next_of(skb) = self.head };
        if self.tail.is_null() {
            self.tail = skb;
        }
        self.head = skb;
        self.len += 1;
    }

    /// Takes the first buffer out.
    pub(crate) fn pop_front(&mut self) -> Option<SkBuff<C>> {
        let skb = NonNull::new(self.head)?;
        // SAFETY: By the type invariant the buffer is valid, and it leaves the list here.
        unsafe {
            self.head = *next_of(skb.as_ptr());
            *next_of(skb.as_ptr()) = ptr::null_mut();
        }
        if self.head.is_null() {
            self.tail = ptr::null_mut();
        }
        self.len -= 1;
        // SAFETY: It went in by `into_raw()`, and is now out.
        Some(unsafe { SkBuff::from_raw(skb) })
    }

    /// The last buffer, where there is one.
    pub(crate) fn back_mut(&mut self) -> Option<QueuedSkBuff<'_, C>> {
        let skb = NonNull::new(self.tail)?;
        // SAFETY: By the type invariant, and the queue is borrowed.
        Some(unsafe { QueuedSkBuff::new(skb) })
    }

    /// Appends a buffer, where there is one.
    pub(crate) fn extend(&mut self, skb: Option<SkBuff<C>>) {
        if let Some(skb) = skb {
            self.push_back(skb);
        }
    }

    /// Calls `f` with each buffer from the first on.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&SkBuff<C>)) {
        let _ = self.try_for_each(|skb| {
            f(skb);
            ControlFlow::<()>::Continue(())
        });
    }

    /// Calls `f` with each buffer from the first on, until it breaks off.
    pub(crate) fn try_for_each<B>(
        &self,
        mut f: impl FnMut(&SkBuff<C>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let mut at = self.head;
        while let Some(skb) = NonNull::new(at) {
            // SAFETY: By the type invariant; `ManuallyDrop` leaves it in the queue.
            let skb = ManuallyDrop::new(unsafe { SkBuff::from_raw(skb) });
            f(&skb)?;
            // SAFETY: The buffer is valid.
            at = unsafe { *next_of(skb.as_raw()) };
        }
        ControlFlow::Continue(())
    }

    /// Frees all buffers, which have served their purpose.
    pub(crate) fn consume(mut self) {
        while let Some(skb) = self.pop_front() {
            skb.consume();
        }
    }

    /// Takes everything out.
    pub(crate) fn take(&mut self) -> Self {
        core::mem::replace(self, Self::new())
    }

    /// Puts all buffers of `front` before those of this queue.
    pub(crate) fn prepend(&mut self, front: Self) {
        let front = ManuallyDrop::new(front);
        if front.tail.is_null() {
            return;
        }
        // SAFETY: The last buffer of `front` is valid.
        unsafe { *next_of(front.tail) = self.head };
        if self.tail.is_null() {
            self.tail = front.tail;
        }
        self.head = front.head;
        self.len += front.len;
    }

    /// Puts all buffers of `back` behind those of this queue.
    pub(crate) fn append(&mut self, mut back: Self) {
        back.prepend(self.take());
        *self = back;
    }

    /// Takes out the buffers for which `matches` holds, in order.
    pub(crate) fn extract(&mut self, mut matches: impl FnMut(&SkBuff<C>) -> bool) -> Self {
        let mut all = self.take();
        let mut extracted = Self::new();
        while let Some(skb) = all.pop_front() {
            if matches(&skb) {
                extracted.push_back(skb);
            } else {
                self.push_back(skb);
            }
        }
        extracted
    }
}

impl<C> Drop for SkBuffQueue<C> {
    fn drop(&mut self) {
        while self.pop_front().is_some() {}
    }
}
