// SPDX-License-Identifier: GPL-2.0

//! Interrupt moderation: whether the work for a queue of the device runs at once, or when it is its turn.
//!
//! Somebody may wait for a packet, so as a rule the work runs before programs do. But a program that sends many small packets
//! would give up its CPU for each of them: to the buffer that the device has used, and to the credit that the peer sends
//! back. Where an interrupt finds the sender running, the work therefore waits for the CPU as a program does. What the sender
//! sends meanwhile waits too, and goes to the device in one batch, with one notification. A task that connects, closes,
//! receives from a stream or polls in vain is a sender no more, and realtime tasks never are: the work may have no turn beside
//! them.
//!
//! Nor does work go before programs while the device sends faster than the guest receives: programs get their part of the CPU then.

use super::{queue_work, queue_work_in_turn, work, VsockDriver};
use crate::af_vsock_glue::workqueue::{current_is_realtime, jiffies};
use kernel::{
    cpu::CpuId,
    current,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc,
    },
    time::msecs_to_jiffies,
    workqueue::{HasWork, WorkItem},
};

/// No number of a CPU.
const NO_CPU: u32 = u32::MAX;

/// The PID of no task that sends.
const NO_TASK: i32 = -1;

/// Payload of more bytes is no small packet: what it takes to notify the device is little beside it, and a batch of such would
/// be most of what the peer has room for.
pub(super) const LONGEST_SMALL_PAYLOAD: usize = 1024;

/// For how long after its last packet a task counts as the sender, in milliseconds: then it does something else.
const SENDER_TIMEOUT_MS: u32 = 10;

/// For how long the device counts as one that sends faster than the guest receives, since that was so, in milliseconds.
const FLOOD_TIMEOUT_MS: u32 = 10;

/// What is known of senders and of work that waits for its turn, for the guest as a whole. It may be out of date: then
/// packets go in smaller batches, or work waits for a turn, or does not.
pub(crate) struct Moderation {
    /// The PID of the task that has sent a small packet last, and done nothing since that would have it wait for an answer.
    sender: Atomic<i32>,
    /// When it did, in jiffies.
    sent_at: Atomic<usize>,
    /// The CPU on which work waits for its turn.
    busy_cpu: Atomic<u32>,
    /// When the device has last sent faster than the guest receives, in jiffies.
    flooded_at: Atomic<usize>,
}

impl Moderation {
    /// No task has sent anything.
    pub(super) fn new() -> Self {
        Self {
            sender: Atomic::new(NO_TASK),
            sent_at: Atomic::new(0),
            busy_cpu: Atomic::new(NO_CPU),
            flooded_at: Atomic::new(0),
        }
    }

    /// Whether the current task is the sender.
    fn is_sender(&self) -> bool {
        self.sender.load(Relaxed) == current!().pid()
    }

    /// Whether the current task is busy sending: the sender, which is no realtime task meanwhile and sends still.
    fn is_busy_sender(&self) -> bool {
        self.is_sender() && is_within(SENDER_TIMEOUT_MS, &self.sent_at) && !current_is_realtime()
    }

    /// Notes that the work of a queue has found much to do and more to come.
    pub(super) fn note_flood(&self) {
        self.flooded_at.store(jiffies(), Relaxed);
    }

    /// Whether the device sends faster than the guest receives.
    fn is_flooded(&self) -> bool {
        is_within(FLOOD_TIMEOUT_MS, &self.flooded_at)
    }

    /// Notes that the current task sends so many bytes of payload. Whether these had better wait, because work does that
    /// waits for this task.
    pub(super) fn note_payload(&self, len: usize) -> bool {
        if len > LONGEST_SMALL_PAYLOAD || current_is_realtime() {
            return false;
        }
        let now = jiffies();
        // Written only where it is news: the CPUs share it.
        if self.sent_at.load(Relaxed) != now {
            self.sent_at.store(now, Relaxed);
        }
        if self.is_sender() {
            return self.busy_cpu.load(Relaxed) == CpuId::current().as_u32();
        }
        self.sender.store(current!().pid(), Relaxed);
        false
    }

    /// Notes that the current task may wait for an answer: it receives, or has sent something else than payload. Whether
    /// small packets that it has sent may wait.
    pub(super) fn note_pause(&self) -> bool {
        if !self.is_sender() {
            return false;
        }
        self.sender.store(NO_TASK, Relaxed);
        self.busy_cpu.load(Relaxed) != NO_CPU
    }

    /// Notes that the current task, the work's, takes a batch to the device: it need not be interrupted for what answers
    /// that. Gives the sender so far, for [`Self::end_batch`].
    pub(super) fn begin_batch(&self) -> i32 {
        let sender = self.sender.load(Relaxed);
        self.sender.store(current!().pid(), Relaxed);
        sender
    }

    /// Notes that the batch is with the device. The sender is one again, even if it has paused meanwhile: that costs a turn.
    pub(super) fn end_batch(&self, sender: i32) {
        if self.is_sender() {
            self.sender.store(sender, Relaxed);
        }
    }

    /// Notes that the work has its turn.
    pub(super) fn note_turn(&self) {
        self.busy_cpu.store(NO_CPU, Relaxed);
    }
}

/// Whether so many milliseconds have not passed since a time in jiffies.
fn is_within(milliseconds: u32, since: &Atomic<usize>) -> bool {
    jiffies().wrapping_sub(since.load(Relaxed)) <= msecs_to_jiffies(milliseconds)
}

impl VsockDriver {
    /// Lets the work of a queue run for which the device has interrupted. Callable in any context.
    pub(super) fn queue_work_unless_flooded<const ID: u64>(self: &Arc<Self>)
    where
        Self: WorkItem<ID, Pointer = Arc<Self>> + HasWork<Self, ID>,
    {
        match self.moderation.is_flooded() {
            true => queue_work_in_turn::<ID>(self.clone()),
            false => queue_work::<ID>(self.clone()),
        }
    }

    /// The same, with regard to the task that was interrupted. Hard interrupt context; with PREEMPT_RT a thread's, which is no
    /// sender.
    pub(super) fn queue_moderated_work<const ID: u64>(self: &Arc<Self>)
    where
        Self: WorkItem<ID, Pointer = Arc<Self>> + HasWork<Self, ID>,
    {
        if !self.moderation.is_busy_sender() {
            return self.queue_work_unless_flooded::<ID>();
        }
        let cpu = CpuId::current().as_u32();
        self.moderation.busy_cpu.store(cpu, Relaxed);
        queue_work_in_turn::<ID>(self.clone());
        // It notes that it has had its turn, and takes batches to the device.
        queue_work_in_turn::<{ work::TX }>(self.clone());
    }
}
