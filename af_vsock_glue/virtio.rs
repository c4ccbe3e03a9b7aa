// SPDX-License-Identifier: GPL-2.0

//! Virtio drivers, devices and virtqueues of socket buffers.
//!
//! C headers: [`include/linux/virtio.h`](srctree/include/linux/virtio.h),
//! [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use super::{
    bindings,
    skb::{Control, Direction, FromDevice, SkBuff, ToDevice},
};
use core::{
    marker::PhantomData,
    mem::{offset_of, ManuallyDrop},
    ptr,
    ptr::NonNull,
};
use kernel::{
    error::{code, from_result, to_result},
    ffi::{c_char, c_int, c_uint, c_void},
    prelude::*,
    sync::{new_condvar, new_mutex, Arc, ArcBorrow, CondVar, Mutex},
    types::Opaque,
};

/// Numbers of the kernel's headers, and of this project's own for the checkpoint extension.
pub(crate) mod uapi {
    pub(crate) use super::bindings::{
        virtio_vsock_cid_update, virtio_vsock_tuple, VIRTIO_ID_VSOCK, VIRTIO_VSOCK_EVENT_BUF_SIZE,
        VIRTIO_VSOCK_EVENT_CID_UPDATE, VIRTIO_VSOCK_F_CHECKPOINT, VIRTIO_VSOCK_MAX_TUPLES,
    };
}

/// What a virtio driver implements.
///
/// The driver core calls `probe`, `remove`, `freeze` and `restore` in process context, one at a time for
/// a device, but for several devices at once.
pub(crate) trait Driver: Send + Sync + Sized + 'static {
    /// The virtio device type that the driver serves.
    const DEVICE_TYPE: u32;
    /// The device feature bits that the driver knows.
    const FEATURES: &'static [u32];

    /// A device was found; its features are negotiated.
    fn probe(this: ArcBorrow<'_, Self>, device: &Device) -> Result;

    /// The device goes away. The driver drops the device's virtqueues here or before.
    fn remove(this: ArcBorrow<'_, Self>, device: &Device);

    /// The system is about to sleep. The driver drops the device's virtqueues here.
    fn freeze(this: ArcBorrow<'_, Self>, device: &Device) -> Result;

    /// The system woke up; the device is as new.
    fn restore(this: ArcBorrow<'_, Self>, device: &Device) -> Result;

    /// The device has used buffers of a queue. Called in hard interrupt context.
    fn queue_used(this: ArcBorrow<'_, Self>, queue: u32);

    /// The device has changed its status or its configuration space. Called with a spinlock of virtio's and interrupts off: in
    /// hard interrupt context, or, for a change that came during probe, freeze or restore, in process context after it.
    fn config_changed(this: ArcBorrow<'_, Self>);
}

/// The registration of a virtio driver; dropping it unbinds the driver from its devices.
#[pin_data(PinnedDrop)]
#[repr(C)]
pub(crate) struct Registration<T: Driver> {
    // First, so that a pointer to it is a pointer to the registration.
    #[pin]
    driver: Opaque<bindings::virtio_driver>,
    #[pin]
    ids: Opaque<[bindings::virtio_device_id; 2]>,
    context: Arc<T>,
    live_queues: Arc<LiveQueues>,
}

// SAFETY: There is nothing to do with a shared registration.
unsafe impl<T: Driver> Sync for Registration<T> {}
// SAFETY: It may be dropped by any thread.
unsafe impl<T: Driver> Send for Registration<T> {}

impl<T: Driver> Registration<T> {
    /// Registers the driver, `context` goes to all its callbacks.
    pub(crate) fn new<'a>(
        name: &'static CStr,
        module: &'static ThisModule,
        context: Arc<T>,
    ) -> impl PinInit<Self, Error> + 'a {
        try_pin_init!(&this in Self {
            ids <- Opaque::ffi_init(|slot: *mut [bindings::virtio_device_id; 2]| {
                let id = bindings::virtio_device_id {
                    device: T::DEVICE_TYPE,
                    vendor: bindings::VIRTIO_DEV_ANY_ID,
                };
                let end = bindings::virtio_device_id { device: 0, vendor: 0 };
                // SAFETY: `slot` is valid for writes.
                unsafe { slot.write([id, end]) };
            }),
            context,
            live_queues: LiveQueues::new()?,
            driver <- Opaque::try_ffi_init(move |slot: *mut bindings::virtio_driver| {
                // SAFETY: All-zero is a valid `struct virtio_driver`; `slot` is valid for writes. The table
                // of ids is in the same pinned object.
                unsafe {
                    slot.write_bytes(0, 1);
                    (*slot).driver.name = name.as_char_ptr();
                    (*slot).id_table = (&raw const (*this.as_ptr()).ids).cast();
                    (*slot).feature_table = T::FEATURES.as_ptr();
                    (*slot).feature_table_size = T::FEATURES.len() as c_uint;
                    (*slot).probe = Some(Self::probe);
                    (*slot).remove = Some(Self::remove);
                    (*slot).freeze = Some(Self::freeze);
                    (*slot).restore = Some(Self::restore);
                    (*slot).config_changed = Some(Self::config_changed);
                    bindings::vsock_glue_set_groups(slot);
                }
                // SAFETY: The driver is filled in, and stays where it is until it is unregistered. The
                // module's pointer is the same type seen by two sets of bindings.
                to_result(unsafe {
                    bindings::__register_virtio_driver(slot, module.as_ptr().cast())
                })
            }),
        })
    }

    /// The registration that a device is bound to.
    ///
    /// # Safety
    ///
    /// `vdev` is a device that is bound to, or being bound to, a driver of this type, for all of `'a`.
    unsafe fn of<'a>(vdev: *mut bindings::virtio_device) -> &'a Self {
        // SAFETY: The driver core sets the pointer before `probe` and clears it after `remove`. It points
        // into a `struct virtio_driver`, which is the first field of a `repr(C)` registration.
        unsafe {
            let driver = (*vdev).dev.driver.cast::<u8>();
            &*driver
                .sub(offset_of!(bindings::virtio_driver, driver))
                .cast()
        }
    }

    /// The same, and the device as its driver sees it.
    ///
    /// # Safety
    ///
    /// As of [`Self::of`].
    unsafe fn with_device<'a>(vdev: *mut bindings::virtio_device) -> (&'a Self, Device) {
        // SAFETY: As the caller promises.
        let this = unsafe { Self::of(vdev) };
        // INVARIANT: As the caller promises.
        let device = Device {
            vdev,
            callback: Self::used,
            live_queues: this.live_queues.clone(),
        };
        (this, device)
    }

    extern "C" fn probe(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The core calls with a device of ours.
        let (this, device) = unsafe { Self::with_device(vdev) };
        from_result(|| {
            T::probe(this.context.as_arc_borrow(), &device)?;
            Ok(0)
        })
    }

    extern "C" fn remove(vdev: *mut bindings::virtio_device) {
        // SAFETY: The core calls with a device of ours.
        let (this, device) = unsafe { Self::with_device(vdev) };
        T::remove(this.context.as_arc_borrow(), &device);
        this.live_queues.wait_until_gone(vdev);
        // SAFETY: The device is valid. It is reset already, unless it could not be restored after a sleep and
        // had no queues.
        unsafe { bindings::virtio_reset_device(vdev) };
    }

    extern "C" fn freeze(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The core calls with a device of ours.
        let (this, device) = unsafe { Self::with_device(vdev) };
        from_result(|| {
            T::freeze(this.context.as_arc_borrow(), &device)?;
            this.live_queues.wait_until_gone(vdev);
            Ok(0)
        })
    }

    extern "C" fn restore(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The core calls with a device of ours.
        let (this, device) = unsafe { Self::with_device(vdev) };
        from_result(|| {
            T::restore(this.context.as_arc_borrow(), &device)?;
            Ok(0)
        })
    }

    extern "C" fn config_changed(vdev: *mut bindings::virtio_device) {
        // SAFETY: The core calls between `probe` and `remove`, with a device of ours.
        let this = unsafe { Self::of(vdev) };
        T::config_changed(this.context.as_arc_borrow());
    }

    extern "C" fn used(vq: *mut bindings::virtqueue) {
        // SAFETY: Queues exist only while their device is bound.
        let (this, index) = unsafe { (Self::of((*vq).vdev), (*vq).index) };
        T::queue_used(this.context.as_arc_borrow(), index);
    }
}

#[pinned_drop]
impl<T: Driver> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: It was registered when it was made.
        unsafe { bindings::unregister_virtio_driver(self.driver.get()) }
    }
}

/// The devices whose virtqueues exist, so that no device goes away under them.
#[pin_data]
struct LiveQueues {
    #[pin]
    devices: Mutex<KVec<usize>>,
    #[pin]
    changed: CondVar,
}

impl LiveQueues {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                devices <- new_mutex!(KVec::new()),
                changed <- new_condvar!(),
            }),
            GFP_KERNEL,
        )
    }

    fn add(&self, vdev: *mut bindings::virtio_device) -> Result {
        self.devices.lock().push(vdev.addr(), GFP_KERNEL)?;
        Ok(())
    }

    fn contains(&self, vdev: *mut bindings::virtio_device) -> bool {
        self.devices.lock().contains(&vdev.addr())
    }

    fn remove(&self, vdev: *mut bindings::virtio_device) {
        self.devices.lock().retain(|live| *live != vdev.addr());
        self.changed.notify_all();
    }

    fn wait_until_gone(&self, vdev: *mut bindings::virtio_device) {
        let mut devices = self.devices.lock();
        while devices.contains(&vdev.addr()) {
            self.changed.wait(&mut devices);
        }
    }
}

/// A device, during a callback of its driver.
///
/// # Invariants
///
/// `vdev` is a valid device that is bound to, or being bound to, the driver that `callback` belongs to.
pub(crate) struct Device {
    vdev: *mut bindings::virtio_device,
    callback: extern "C" fn(*mut bindings::virtqueue),
    live_queues: Arc<LiveQueues>,
}

impl Device {
    /// Whether driver and device agreed on a feature.
    pub(crate) fn has_feature(&self, feature: u32) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_has_feature(self.vdev, feature) }
    }

    /// Makes the device's first `N` virtqueues. The device does not use them before [`LiveDevice::start`]. EBUSY where it has
    /// some.
    pub(crate) fn make_queues<const N: usize>(
        &self,
        names: [&'static CStr; N],
    ) -> Result<(Arc<LiveDevice>, [RawQueue; N])> {
        if self.live_queues.contains(self.vdev) {
            return Err(EBUSY);
        }
        let names = names.map(|name| name.as_char_ptr());
        let mut queues = [ptr::null_mut(); N];
        let live = Arc::pin_init(
            try_pin_init!(LiveDevice {
                vdev: self.vdev,
                live_queues: self.live_queues.clone(),
                state <- new_mutex!(QueueState::None),
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The device is valid and has no queues: callbacks of a device come one at a time. Both arrays have `N` entries,
        // and the names live for ever.
        to_result(unsafe {
            bindings::vsock_glue_find_vqs(
                self.vdev,
                N as c_uint,
                queues.as_mut_ptr(),
                names.as_ptr().cast::<*const c_char>(),
                Some(self.callback),
            )
        })?;
        // From here on dropping `live` deletes the queues.
        *live.state.lock() = QueueState::InUse;
        self.live_queues.add(self.vdev)?;
        if queues.contains(&ptr::null_mut()) {
            return Err(ENOENT);
        }
        // INVARIANT: All are queues of `live`, new and so empty.
        let raw = queues.map(|vq| RawQueue {
            // SAFETY: None of them is null.
            vq: unsafe { NonNull::new_unchecked(vq) },
            device: live.clone(),
        });
        Ok((live, raw))
    }
}

impl AsRef<kernel::device::Device> for Device {
    fn as_ref(&self) -> &kernel::device::Device {
        // SAFETY: The device is valid during the callback; the two bindings see the same C type.
        unsafe { kernel::device::Device::from_raw((&raw mut (*self.vdev).dev).cast()) }
    }
}

/// Why connections of a guest were reset, or go on by other addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cause {
    /// The device has lost all connections.
    TransportReset,
    /// The device has listed those that go on.
    CidUpdate,
}

/// A migration as programs see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Migration {
    pub(crate) cause: Cause,
    /// A number that grows with each.
    pub(crate) generation: u64,
    /// The guest's CID before; `VMADDR_CID_ANY` where it had none.
    pub(crate) old_cid: u32,
    /// The guest's CID now; `VMADDR_CID_ANY` where it has none.
    pub(crate) new_cid: u32,
    /// How many connections were reset.
    pub(crate) reset: u32,
    /// How many connections go on.
    pub(crate) kept: u32,
}

impl Migration {
    fn to_raw(self) -> bindings::vsock_glue_migration {
        let cause = match self.cause {
            Cause::TransportReset => bindings::vsock_glue_cause_VSOCK_GLUE_TRANSPORT_RESET,
            Cause::CidUpdate => bindings::vsock_glue_cause_VSOCK_GLUE_CID_UPDATE,
        };
        bindings::vsock_glue_migration {
            generation: self.generation,
            cause,
            old_cid: self.old_cid,
            new_cid: self.new_cid,
            reset: self.reset,
            kept: self.kept,
        }
    }
}

enum QueueState {
    /// There are no queues.
    None,
    /// The device may use the queues.
    InUse,
    /// The device was reset: it uses no buffer any more.
    Reset,
}

/// A device with virtqueues. Dropped with the last of them, it resets the device and deletes them.
///
/// # Invariants
///
/// `vdev` is valid as long as this lives: [`Registration`] waits for that before it lets a device go.
#[pin_data(PinnedDrop)]
pub(crate) struct LiveDevice {
    vdev: *mut bindings::virtio_device,
    live_queues: Arc<LiveQueues>,
    /// Held while the device is reset.
    #[pin]
    state: Mutex<QueueState>,
}

// SAFETY: The functions that are called on the device may be called by any thread.
unsafe impl Send for LiveDevice {}
// SAFETY: As above; resets are serialised by `state`.
unsafe impl Sync for LiveDevice {}

impl LiveDevice {
    /// Lets the device begin to use the queues.
    pub(crate) fn start(&self) {
        // SAFETY: By the type invariant; it is called once, as the driver just made the queues.
        unsafe { bindings::vsock_glue_device_ready(self.vdev) }
    }

    /// Whether the device says that it does not work any more until it is reset. May sleep.
    pub(crate) fn needs_reset(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_needs_reset(self.vdev) }
    }

    /// Reads a little-endian 64-bit field of the device's configuration space. May sleep.
    pub(crate) fn read_config_le64(&self, offset: u32) -> u64 {
        // SAFETY: By the type invariant.
        unsafe { bindings::vsock_glue_read_config_le64(self.vdev, offset) }
    }

    /// Shows a migration in the device's folder in sysfs. Sleeps.
    pub(crate) fn show(&self, migration: &Migration) {
        // SAFETY: What is shown is copied.
        unsafe { bindings::vsock_glue_show_migration(&migration.to_raw()) }
    }

    /// Lets programs know of a migration: by a uevent of the device, and in its folder in sysfs. Sleeps.
    pub(crate) fn announce(&self, migration: &Migration) {
        // SAFETY: The device is valid by the type invariant, and what is announced is copied.
        unsafe { bindings::vsock_glue_announce(self.vdev, &migration.to_raw()) }
    }

    /// Resets the device, once: afterwards it uses no buffer any more.
    fn reset(&self) {
        let mut state = self.state.lock();
        if let QueueState::InUse = *state {
            // SAFETY: By the type invariant. No queue is being kicked: that takes a `Virtqueue` mutably, and
            // the driver drops all of them together.
            unsafe { bindings::virtio_reset_device(self.vdev) };
            *state = QueueState::Reset;
        }
    }
}

#[pinned_drop]
impl PinnedDrop for LiveDevice {
    fn drop(self: Pin<&mut Self>) {
        self.reset();
        if let QueueState::Reset = *self.state.lock() {
            // SAFETY: The device is valid and was reset, and the last queue is gone.
            unsafe { bindings::vsock_glue_del_vqs(self.vdev) };
        }
        self.live_queues.remove(self.vdev);
    }
}

/// A virtqueue of which it is not said yet what its buffers hold.
///
/// # Invariants
///
/// `vq` is a queue of `device`, empty, and nobody else has it.
pub(crate) struct RawQueue {
    vq: NonNull<bindings::virtqueue>,
    device: Arc<LiveDevice>,
}

/// Whether the system is being switched off, for which all virtqueues are broken.
pub(crate) fn is_shutting_down() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::vsock_glue_is_shutting_down() }
}

/// A virtqueue of socket buffers with control block `C`.
///
/// A buffer in the queue is the queue's; it comes back by `pop_sent()` or `pop_received()`, by its [direction](Control).
/// What is still there when the queue is dropped is freed, after the device was reset: so a driver takes all queues of a
/// device out of use before it drops the first. Dropping may sleep.
///
/// # Invariants
///
/// `vq` is a queue of `device`, its tokens are buffers with a `C`, and nobody else uses it.
pub(crate) struct Virtqueue<C: Control> {
    vq: NonNull<bindings::virtqueue>,
    device: Arc<LiveDevice>,
    _buffers: PhantomData<SkBuff<C>>,
}

// SAFETY: A virtqueue is not bound to a thread. Its functions take it mutably, as the C functions want it.
unsafe impl<C: Control + Send> Send for Virtqueue<C> {}

/// Why a buffer was not put into a queue.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PushError {
    /// There is no room, until the device has used a buffer.
    Full,
    /// There is no memory to map the buffer now.
    NoMemory,
    /// The queue does not work any more.
    Failed(Error),
}

/// The device claims to have written more into a buffer than it has room for.
#[derive(Debug)]
pub(crate) struct UsedLengthTooLarge;

impl<C: Control> From<RawQueue> for Virtqueue<C> {
    fn from(raw: RawQueue) -> Self {
        // INVARIANT: The queue is empty and `raw`'s alone.
        Self {
            vq: raw.vq,
            device: raw.device,
            _buffers: PhantomData,
        }
    }
}

impl<C: Control> Virtqueue<C> {
    /// The device that the queue belongs to.
    pub(crate) fn device(&self) -> &LiveDevice {
        &self.device
    }

    /// How many descriptors the queue has.
    pub(crate) fn size(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { bindings::virtqueue_get_vring_size(self.vq.as_ptr()) }
    }

    /// Whether any packet fits into the empty queue, with each of its segments in a descriptor of its own.
    pub(crate) fn takes_any_packet(&self) -> bool {
        // SAFETY: No preconditions.
        self.size() >= unsafe { bindings::vsock_glue_most_segments() }
    }

    /// Whether the device broke the queue's rules, so that it is not used any more.
    pub(crate) fn is_broken(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::virtqueue_is_broken(self.vq.as_ptr()) }
    }

    /// Puts a buffer into the queue, `room` bytes of its tailroom where the device writes to it. Returns where it is. May sleep.
    fn push(
        &mut self,
        skb: SkBuff<C>,
        room: u32,
    ) -> Result<NonNull<bindings::sk_buff>, (SkBuff<C>, PushError)> {
        let skb = skb.into_raw();
        // SAFETY: The queue is ours, and the buffer now is the queue's.
        let pushed = to_result(unsafe {
            if C::Direction::TO_DEVICE {
                bindings::vsock_glue_add_out(self.vq.as_ptr(), skb)
            } else {
                bindings::vsock_glue_add_in(self.vq.as_ptr(), skb, room)
            }
        });
        // SAFETY: It comes from `into_raw()`.
        let skb = unsafe { NonNull::new_unchecked(skb) };
        match pushed {
            Ok(()) => Ok(skb),
            Err(error) => {
                // SAFETY: It was made by `into_raw()` above, and the queue has not taken it.
                let skb = unsafe { SkBuff::from_raw(skb) };
                let error = match error {
                    code::ENOSPC => PushError::Full,
                    // Where it cannot be mapped now, a split ring says ENOMEM and a packed one EIO.
                    code::ENOMEM | code::EIO if !self.is_broken() => PushError::NoMemory,
                    error => PushError::Failed(error),
                };
                Err((skb, error))
            }
        }
    }

    /// Tells the device of the buffers that were put in, where it wants to know.
    pub(crate) fn kick(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::virtqueue_kick(self.vq.as_ptr()) };
    }

    /// Asks the device not to interrupt for used buffers (a hint).
    pub(crate) fn disable_interrupts(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::virtqueue_disable_cb(self.vq.as_ptr()) }
    }

    /// Asks the device to interrupt for used buffers; `false` where there are some already.
    pub(crate) fn enable_interrupts(&mut self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::virtqueue_enable_cb(self.vq.as_ptr()) }
    }

    /// Takes a used buffer out, with the number of bytes that the device says it wrote.
    fn pop_used(&mut self) -> Option<(SkBuff<C>, u32)> {
        let mut written = 0;
        // SAFETY: By the type invariant. The function checks what the device says of which buffer it used.
        let token = unsafe { bindings::virtqueue_get_buf(self.vq.as_ptr(), &mut written) };
        Some((self.buffer_of(token)?, written))
    }

    /// The buffer of a token that came out of the queue.
    fn buffer_of(&self, token: *mut c_void) -> Option<SkBuff<C>> {
        // SAFETY: By the type invariant tokens are buffers with a `C`; this one is out of the queue.
        Some(unsafe { SkBuff::from_raw(NonNull::new(token.cast())?) })
    }
}

impl<C: Control<Direction = ToDevice>> Virtqueue<C> {
    /// Puts a buffer into the queue for the device to read. `taken` sees it when it is there, and the device, which need not
    /// wait to be told, perhaps reads it already. May sleep.
    pub(crate) fn push_filled(
        &mut self,
        skb: SkBuff<C>,
        taken: impl FnOnce(&SkBuff<C>),
    ) -> Result<(), (SkBuff<C>, PushError)> {
        let skb = self.push(skb, 0)?;
        // SAFETY: The queue has it, and gives it to nobody while it is borrowed here; `ManuallyDrop` leaves it there. No device
        // writes to it.
        let skb = ManuallyDrop::new(unsafe { SkBuff::from_raw(skb) });
        taken(&skb);
        Ok(())
    }

    /// Takes out a buffer that the device has read.
    pub(crate) fn pop_sent(&mut self) -> Option<SkBuff<C>> {
        self.pop_used().map(|(skb, _)| skb)
    }
}

impl<C: Control<Direction = FromDevice>> Virtqueue<C> {
    /// Puts a buffer into the queue for the device to write into its tailroom. May sleep.
    pub(crate) fn push_empty(&mut self, skb: SkBuff<C>) -> Result<(), (SkBuff<C>, PushError)> {
        self.push_empty_with_room(skb, u32::MAX)
    }

    /// The same, for the first `room` bytes of the tailroom at most.
    pub(crate) fn push_empty_with_room(
        &mut self,
        skb: SkBuff<C>,
        room: u32,
    ) -> Result<(), (SkBuff<C>, PushError)> {
        self.push(skb, room).map(|_| ())
    }

    /// Takes out a buffer with what the device wrote as its data.
    pub(crate) fn pop_received(&mut self) -> Option<Result<SkBuff<C>, UsedLengthTooLarge>> {
        let (mut skb, written) = self.pop_used()?;
        Some(if skb.set_received(written as usize) {
            Ok(skb)
        } else {
            Err(UsedLengthTooLarge)
        })
    }
}

impl<C: Control> Drop for Virtqueue<C> {
    fn drop(&mut self) {
        self.device.reset();
        loop {
            // SAFETY: The device was reset, so it uses none of the buffers.
            let token = unsafe { bindings::virtqueue_detach_unused_buf(self.vq.as_ptr()) };
            if self.buffer_of(token).is_none() {
                break;
            }
        }
    }
}
