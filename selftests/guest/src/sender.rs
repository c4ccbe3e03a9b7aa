// SPDX-License-Identifier: GPL-2.0

//! Calls that send until they are asked to end.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Ended = Arc<AtomicBool>;

/// The calls that send, by the descriptors of their sockets.
static SENDERS: Mutex<Option<HashMap<RawFd, Ended>>> = Mutex::new(None);

fn senders() -> MutexGuard<'static, Option<HashMap<RawFd, Ended>>> {
    SENDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call that sends.
pub struct Sender {
    fd: RawFd,
    ended: Ended,
}

impl Sender {
    pub fn new(fd: RawFd) -> Self {
        let ended = Ended::default();
        senders().get_or_insert_default().insert(fd, ended.clone());
        Self { fd, ended }
    }

    /// Whether it was asked to end. Looked at after each part, so at least one part is always sent.
    pub fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Asks the call that sends on a socket to end; returns whether there is one.
    pub fn end(fd: RawFd) -> bool {
        let senders = senders();
        let sender = senders.as_ref().and_then(|senders| senders.get(&fd));
        sender.is_some_and(|ended| {
            ended.store(true, Ordering::Relaxed);
            true
        })
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        senders().get_or_insert_default().remove(&self.fd);
    }
}
