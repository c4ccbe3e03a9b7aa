// SPDX-License-Identifier: GPL-2.0

//! Interrupt moderation: whether the work for a queue of the device runs at once, or when it is its turn.
//!
//! Somebody may wait for a packet, so as a rule the work runs before programs do. But a program that sends many small packets
//! would give up its CPU for each of them: to the buffer that the device has used, and to the credit that the peer sends
//! back. Where an interrupt finds the sender running, the work therefore waits for the CPU as a program does. What the sender
//! sends meanwhile waits too, and goes to the device in one batch, with one notification. A task that receives, even if it
//! polls without sleeping, or that connects or closes, is no such sender.

use super::{work, VsockDriver};
use kernel::{
    cpu::CpuId,
    current,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc,
    },
    workqueue::{HasWork, WorkItem},
};

/// No number of a CPU.
const NO_CPU: u32 = u32::MAX;

/// The PID of no task that sends.
const NO_TASK: i32 = -1;

/// What is known of senders and of work that waits for its turn. It may be out of date: then packets go in smaller batches,
/// or one of them goes a turn later.
pub(crate) struct Moderation {
    /// The PID of the task that has sent payload last, and done nothing since that would have it wait for a packet.
    sender: Atomic<i32>,
    /// The CPU on which work waits for its turn.
    busy_cpu: Atomic<u32>,
}

impl Moderation {
    /// No task has sent anything.
    pub(super) fn new() -> Self {
        Self {
            sender: Atomic::new(NO_TASK),
            busy_cpu: Atomic::new(NO_CPU),
        }
    }

    /// Notes that the current task sends payload.
    pub(super) fn note_sender(&self) {
        let pid = current!().pid();
        // Written where it changes only: senders on all CPUs share it.
        if self.sender.load(Relaxed) != pid {
            self.sender.store(pid, Relaxed);
        }
    }

    /// Notes that the current task may wait for a packet: it receives, or has sent something else than payload.
    pub(super) fn note_pause(&self) {
        if self.sender.load(Relaxed) == current!().pid() {
            self.sender.store(NO_TASK, Relaxed);
        }
    }

    /// Whether work waits for the CPU that the current task has.
    pub(super) fn work_waits_here(&self) -> bool {
        self.busy_cpu.load(Relaxed) == CpuId::current().as_u32()
    }

    /// Notes that the work runs that takes batches to the device.
    pub(super) fn note_work(&self) {
        self.busy_cpu.store(NO_CPU, Relaxed);
        // It sends the batch, and need not give up the CPU for the answers to that either.
        self.note_sender();
    }
}

impl VsockDriver {
    /// Lets the work of a queue run for which the device has interrupted the current task. Hard interrupt context.
    pub(super) fn queue_moderated_work<const ID: u64>(self: &Arc<Self>)
    where
        Self: WorkItem<ID, Pointer = Arc<Self>> + HasWork<Self, ID>,
    {
        let is_sender = self.moderation.sender.load(Relaxed) == current!().pid();
        let queue = if is_sender {
            self.moderation
                .busy_cpu
                .store(CpuId::current().as_u32(), Relaxed);
            &self.work_in_turn
        } else {
            &self.work_at_once
        };
        // The error is the driver, given back because the work is queued already.
        let _ = queue.enqueue::<Arc<Self>, ID>(self.clone());
        if is_sender {
            // It notes that it has had its turn.
            self.queue_batch_work();
        }
    }

    /// Lets the work run, when it is its turn, that takes batches to the device. Callable in any context.
    pub(super) fn queue_batch_work(self: &Arc<Self>) {
        let queue = &self.work_in_turn;
        let _ = queue.enqueue::<Arc<Self>, { work::TX }>(self.clone());
    }
}
