// SPDX-License-Identifier: GPL-2.0

//! What was read of the source and is not acknowledged: it may have to be sent again.

use std::collections::VecDeque;

use anyhow::{ensure, Result};

/// How much may wait, in bytes. The source is not read meanwhile.
const CAPACITY: usize = 1024 * 1024;

/// A part of a stream, by offsets of the stream.
#[derive(Debug, Default)]
pub struct Outbox {
    /// All before this is acknowledged.
    acknowledged: u64,
    bytes: VecDeque<u8>,
    /// Where the next byte to be sent stands.
    next: u64,
    /// All before this was sent at least once.
    sent: u64,
    /// How much was sent again, in bytes.
    resent: u64,
}

impl Outbox {
    /// One for a stream whose beginning the collector has.
    pub fn starting_at(offset: u64) -> Self {
        Self {
            acknowledged: offset,
            next: offset,
            sent: offset,
            ..Self::default()
        }
    }

    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    pub fn resent(&self) -> u64 {
        self.resent
    }

    /// Where the next byte of the source stands.
    pub fn end(&self) -> u64 {
        self.acknowledged + self.bytes.len() as u64
    }

    /// How much more of the source there is room for, in bytes.
    pub fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.bytes.len())
    }

    /// Takes what the source has had.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// What is to be sent next, `max` bytes at most, and where it stands; nothing where all was sent.
    pub fn take(&mut self, max: usize) -> (u64, Vec<u8>) {
        let offset = self.next;
        let from = (offset - self.acknowledged) as usize;
        let to = from.saturating_add(max).min(self.bytes.len());
        let part: Vec<u8> = self.bytes.range(from..to).copied().collect();
        self.next += part.len() as u64;
        self.resent += self.sent.min(self.next) - self.sent.min(offset);
        self.sent = self.sent.max(self.next);
        (offset, part)
    }

    /// The collector has all before an offset.
    pub fn acknowledge(&mut self, offset: u64) -> Result<()> {
        let (acknowledged, end) = (self.acknowledged, self.sent);
        ensure!(
            offset >= acknowledged,
            "the collector has lost what it had acknowledged: it has {offset} bytes instead of {acknowledged}"
        );
        ensure!(
            offset <= end,
            "the collector has {offset} bytes of this stream, and {end} were sent: another agent sends as well"
        );
        self.bytes.drain(..(offset - acknowledged) as usize);
        self.acknowledged = offset;
        self.next = self.next.max(offset);
        Ok(())
    }

    /// A new connection, on which the collector said that it has all before an offset.
    pub fn resume(&mut self, offset: u64) -> Result<()> {
        self.acknowledge(offset)?;
        self.next = offset;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Read(usize),
        Send(usize),
        /// So many parts arrive, and so many of their acknowledgements.
        Arrive(usize, usize),
        /// The connection is lost, with all that is under way.
        Reconnect,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1..200_usize).prop_map(Step::Read),
            (1..100_usize).prop_map(Step::Send),
            (0..4_usize, 0..4_usize).prop_map(|(data, acks)| Step::Arrive(data, acks)),
            Just(Step::Reconnect),
        ];
        prop::collection::vec(step, 1..200)
    }

    proptest! {
        /// Whatever is lost with connections: the collector gets each byte once and in order, and what was acknowledged
        /// it has.
        #[test]
        fn exactly_once(steps in steps()) {
            let source = |range: std::ops::Range<u64>| range.map(|at| (at % 251) as u8).collect::<Vec<_>>();
            let mut outbox = Outbox::default();
            let mut stored: Vec<u8> = Vec::new();
            let mut data = VecDeque::new();
            let mut acks = VecDeque::new();
            for step in steps.into_iter().chain([Step::Reconnect, Step::Send(usize::MAX), Step::Arrive(1, 1)]) {
                match step {
                    Step::Read(len) => {
                        let end = outbox.end();
                        outbox.push(&source(end..end + len.min(outbox.room()) as u64));
                    }
                    Step::Send(len) => data.push_back(outbox.take(len)),
                    Step::Arrive(parts, acknowledgements) => {
                        for _ in 0..parts {
                            let Some((offset, part)) = data.pop_front() else { break };
                            prop_assert_eq!(offset, stored.len() as u64);
                            stored.extend(part);
                            acks.push_back(stored.len() as u64);
                        }
                        for _ in 0..acknowledgements {
                            let Some(offset) = acks.pop_front() else { break };
                            outbox.acknowledge(offset).unwrap();
                        }
                    }
                    Step::Reconnect => {
                        data.clear();
                        acks.clear();
                        outbox.resume(stored.len() as u64).unwrap();
                    }
                }
                prop_assert!(outbox.acknowledged() <= stored.len() as u64);
            }
            prop_assert_eq!(&stored, &source(0..outbox.end()));
        }
    }

    #[test]
    fn collectors_that_lose_or_have_too_much_are_told_apart() {
        let mut outbox = Outbox::starting_at(10);
        outbox.push(b"abcdef");
        outbox.take(3);
        assert!(format!("{:#}", outbox.resume(9).unwrap_err()).contains("lost"));
        assert!(format!("{:#}", outbox.resume(14).unwrap_err()).contains("another agent"));
        outbox.resume(13).unwrap();
        assert_eq!(outbox.take(99), (13, b"def".to_vec()));
        assert_eq!(outbox.resent(), 0);
        outbox.resume(13).unwrap();
        outbox.take(99);
        assert_eq!(outbox.resent(), 3);
    }
}
