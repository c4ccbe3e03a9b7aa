// SPDX-License-Identifier: GPL-2.0

//! When to connect again after a connection has failed, or could not be made.
//!
//! The driver's generation tells: one that is another than when the attempt began means that a migration has ended the
//! connection, and the collector is there, perhaps on another host. Where it is the same the collector itself has gone, and
//! whoever tries all the time only burdens the host.

use std::time::Duration;

use serde::Serialize;

/// The first wait, in milliseconds; each that follows is twice as long.
const FIRST_WAIT_MS: u64 = 100;

/// The longest wait, in milliseconds.
const LONGEST_WAIT_MS: u64 = 30_000;

/// The driver's count of migrations; `None` where there is no device, or a driver that does not count.
pub type Generation = Option<u64>;

/// Whether there was a migration between two readings. A device that is gone has not migrated; one that is back has, and so
/// has one whose driver was loaded anew and counts from the beginning.
pub fn migrated(before: Generation, now: Generation) -> bool {
    now.is_some() && now != before
}

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// There was a migration.
    AtOnce,
    /// The collector is gone; a migration ends the wait early.
    After(Duration),
}

/// What a connection continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// The collector knows nothing of this stream.
    New,
    /// It has the beginning, of this very boot.
    Resume,
    /// What it has is of an earlier boot of the guest: this one begins at 0.
    AfterReboot,
}

impl Start {
    /// `collected` is the boot that the collector has of this stream.
    pub fn decide(own_boot: &str, collected: Option<&str>) -> Self {
        match collected {
            None => Self::New,
            Some(boot) if boot == own_boot => Self::Resume,
            Some(_) => Self::AfterReboot,
        }
    }
}

/// What has failed since there was hope last.
#[derive(Debug, Default)]
pub struct Policy {
    failures: u32,
}

impl Policy {
    /// The collector has stored something, or there was a migration.
    pub fn encouraged(&mut self) {
        self.failures = 0;
    }

    /// An attempt, begun at a generation, has failed, or the connection that it made. `random` is from 0 to 1.
    pub fn failed(&mut self, begun: Generation, now: Generation, random: f64) -> Retry {
        if migrated(begun, now) {
            self.encouraged();
            return Retry::AtOnce;
        }
        let longest = FIRST_WAIT_MS
            .saturating_mul(1 << self.failures.min(32))
            .min(LONGEST_WAIT_MS);
        self.failures = self.failures.saturating_add(1);
        // Many guests that lost the same collector shall not come back all at once.
        let wait = longest as f64 * (0.5 + 0.5 * random.clamp(0.0, 1.0));
        Retry::After(Duration::from_millis(wait as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn start_is_told_by_the_boot() {
        assert_eq!(Start::decide("b", None), Start::New);
        assert_eq!(Start::decide("b", Some("b")), Start::Resume);
        assert_eq!(Start::decide("b", Some("a")), Start::AfterReboot);
    }

    #[test]
    fn a_driver_that_does_not_count_or_is_gone_is_no_migration() {
        let mut policy = Policy::default();
        for (begun, now) in [(None, None), (Some(4), None), (Some(4), Some(4))] {
            assert!(matches!(policy.failed(begun, now, 0.5), Retry::After(_)));
        }
        // A device that has come, and a module that was loaded anew and counts from the beginning.
        for (begun, now) in [(None, Some(0)), (Some(4), Some(0))] {
            assert_eq!(policy.failed(begun, now, 0.5), Retry::AtOnce);
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Stored,
        PeerDied,
        Migrated,
    }

    fn events() -> impl Strategy<Value = Vec<(Event, f64)>> {
        let event = prop_oneof![
            1 => Just(Event::Stored),
            4 => Just(Event::PeerDied),
            1 => Just(Event::Migrated),
        ];
        prop::collection::vec((event, 0.0..=1.0), 1..200)
    }

    proptest! {
        /// Whatever has happened before: a migration is never waited for, a dead peer always, and each wait is in the
        /// bounds that the failures since the last good news give it.
        #[test]
        fn waits_are_bounded_and_grow(events in events()) {
            let mut policy = Policy::default();
            let mut generation = 0;
            let mut longest = FIRST_WAIT_MS;
            for (event, random) in events {
                match event {
                    Event::Stored => {
                        policy.encouraged();
                        longest = FIRST_WAIT_MS;
                    }
                    Event::Migrated => {
                        let retry = policy.failed(Some(generation), Some(generation + 1), random);
                        prop_assert_eq!(retry, Retry::AtOnce);
                        generation += 1;
                        longest = FIRST_WAIT_MS;
                    }
                    Event::PeerDied => {
                        let Retry::After(wait) = policy.failed(Some(generation), Some(generation), random) else {
                            return Err(TestCaseError::fail("a dead peer was taken for a migration"));
                        };
                        let wait = wait.as_millis() as u64;
                        prop_assert!((longest / 2..=longest).contains(&wait), "{} of {}", wait, longest);
                        longest = (longest * 2).min(LONGEST_WAIT_MS);
                    }
                }
            }
        }
    }
}
