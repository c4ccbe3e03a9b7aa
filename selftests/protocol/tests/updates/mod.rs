// SPDX-License-Identifier: GPL-2.0

//! What the driver does with events (`driver/updates.rs`, `driver/events.rs`), without a kernel around it: protocol/
//! decides, and here the tests learn what was decided.

use vsock_protocol::cid::Cid;
use vsock_protocol::event::Event;
use vsock_protocol::update::{prepare, Collected, Collector, Due, Key, Tuple, Update};

/// The update that the device is sending, or that is due.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Updates {
    collector: Collector,
    tuples: Vec<Tuple>,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// All connections are reset, and the guest's CID is that of the configuration space.
    TransportReset,
    /// All connections are reset that there are again since an update was refused.
    ResetAgain,
    /// There is no connection for this tuple, so that RST answers it.
    Answer(Tuple),
    /// The update is applied with this list, which is made for `find()`.
    Apply(Update, Vec<Tuple>),
}

impl Updates {
    /// Takes an event. An update that is due goes first.
    pub fn take(&mut self, event: &Event<'_>) -> Vec<Effect> {
        self.take_with_memory(event, true)
    }

    /// Takes an event; without memory for its tuples where `has_memory` says so.
    pub fn take_with_memory(&mut self, event: &Event<'_>, has_memory: bool) -> Vec<Effect> {
        let part = match event {
            Event::TransportReset => {
                *self = Self::default();
                return vec![Effect::TransportReset];
            }
            Event::CidUpdate(part) => part,
        };
        let listed = part.tuples().flatten();
        match self.collector.add(part) {
            Collected::Taken if has_memory => {
                self.tuples.extend(listed);
                Vec::new()
            }
            Collected::OfRefused => {
                let mut effects = vec![Effect::ResetAgain];
                effects.extend(listed.map(Effect::Answer));
                effects
            }
            Collected::Taken | Collected::Refused => {
                self.collector.refuse(part);
                let mut effects = self.refuse();
                effects.extend(listed.map(Effect::Answer));
                effects
            }
        }
    }

    /// Whether an update has come and was not applied yet.
    pub fn is_due(&self) -> bool {
        self.collector.is_due()
    }

    /// Takes the update that is due; `None` where packets of before it go first.
    pub fn take_due(&mut self, rx_handled: u16, guest_cid: Option<Cid>) -> Option<Vec<Effect>> {
        let update = match self.collector.take_due(rx_handled) {
            Due::Nothing => return Some(Vec::new()),
            Due::AfterPackets => return None,
            Due::Now(update) => update,
        };
        let sort = |tuples: &mut [Tuple], key: fn(&Tuple) -> Key| tuples.sort_unstable_by_key(key);
        if !prepare(&update, guest_cid, &mut self.tuples, sort) {
            return Some(self.refuse());
        }
        Some(vec![Effect::Apply(
            update,
            std::mem::take(&mut self.tuples),
        )])
    }

    /// Gives up the update that waits for packets which there are not.
    pub fn refuse_waiting(&mut self) -> Vec<Effect> {
        self.collector.discard();
        self.refuse()
    }

    fn refuse(&mut self) -> Vec<Effect> {
        let listed = std::mem::take(&mut self.tuples);
        let mut effects = vec![Effect::TransportReset];
        effects.extend(listed.into_iter().map(Effect::Answer));
        effects
    }
}
