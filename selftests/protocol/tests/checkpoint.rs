// SPDX-License-Identifier: GPL-2.0

//! The checkpoint extension, model-checked: a driver whose decisions are protocol/'s, a device, and the queues between
//! them, in every order in which events, packets, answers, applications and further updates can come.
//!
//! The oracle is "What must never happen" of Documentation/checkpoint.md. Each [`Fault`] is a step that breaks a clause
//! of the text; that a counterexample is found for each shows that the checker would see it.

#[path = "checkpoint/device.rs"]
mod device;
#[path = "checkpoint/driver.rs"]
mod driver;
mod updates;

use device::{Device, DeviceStep, End};
use driver::{Driver, DriverStep, Queues, Socket};
use stateright::{Checker, Expectation, HasDiscoveries, Model, Property};
use vsock_protocol::cid::Cid;
use vsock_protocol::connection::State;
use vsock_protocol::header::Header;

/// The port that the guest listens at, and one that the host serves.
const LISTENER: u32 = 1234;
const SERVICE: u32 = 4321;

/// The host's port of the first connection; the others follow.
const HOST_PORT: u32 = 5000;

const GUEST_CID: u32 = 3;
const HOST_CID: u32 = 100;

fn cid(raw: u32) -> Cid {
    Cid::from_wire(raw.into()).expect("a CID that is not reserved")
}

/// A packet in a queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    header: Header,
    /// The payload: the connection, and which byte of it this is in its direction.
    byte: Option<(u8, u8)>,
    /// The connection. Only the oracle knows, and who makes an end of a new one.
    of: Option<u8>,
}

fn packet(header: Header, byte: Option<(u8, u8)>) -> Packet {
    Packet {
        header,
        byte,
        of: None,
    }
}

/// A step that breaks the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    // Of the driver
    /// D5: applies an update before the packets of before it.
    IgnoresRxUsed,
    /// D4: looks at events after the packet.
    LooksAtEventsLater,
    /// D6: does not reset what is not listed.
    KeepsUnlisted,
    /// D8: lets packets that wait have their old addresses.
    LeavesOldAddresses,
    /// D9: sends the answer behind packets that wait.
    AnswersLast,
    /// D9: does not answer a tuple without a connection.
    LeavesMissingUnanswered,
    /// D9: ends a connection whose answer waits, and has no memory to say so.
    ForgetsAnswers,
    /// D2: does not answer the tuples of an update that it refuses.
    LeavesRefusedUnanswered,
    /// D2: keeps connections that were made since an update was refused of which more parts come.
    KeepsConnectionsSinceRefusal,
    /// D3: goes on with an update of which a part had come before a transport reset.
    KeepsPartsAtReset,
    /// Resets nothing at a transport reset.
    KeepsConnectionsAtReset,
    /// Does not read its CID at a transport reset.
    KeepsCidAtReset,
    /// D4: drops answers to attempts that bear an old CID.
    DropsOldAnswers,
    /// D10: takes any response for one of after a transport reset.
    TrustsResponses,
    // Of the device
    /// V1: makes packets of after an update available before all of it is.
    PacketsOvertakeUpdates,
    /// V1: makes packets of after a transport reset available before its event is.
    PacketsOvertakeResets,
    /// `rx_used` is not what it should be.
    CountsNoBuffers,
    /// V3: drops packets with old addresses before the answer.
    DropsOldPackets,
    /// V4: drops a request from the old CID.
    DropsOldRequests,
    /// V7: loses answers to requests that wait.
    ForgetsRequests,
    /// Keeps its connections over a transport reset.
    KeepsEndsAtReset,
    /// V8: begins connections with addresses that others had.
    ReusesAddresses,
    /// Does not carry over what was written and not made available.
    LosesWhatWaits,
}

/// What can happen in a run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Connections that there are in the beginning.
    connections: u8,
    migrations: u8,
    resets: u8,
    /// Whether a migration changes CIDs, and a transport reset the guest's.
    moves: bool,
    /// Whether the guest may lack the memory for an update, and before the last migration for telling the host of the end of
    /// a connection.
    lacks_memory: bool,
    /// Bytes that each end may write on each connection, and the size of the receive buffers.
    guest_bytes: u8,
    host_bytes: u8,
    window: u32,
    guest_connects: u8,
    host_connects: u8,
    guest_closes: u8,
    host_closes: u8,
    /// Packets that the transmit queue holds, events that wait for the driver at most, tuples in an event.
    tx_room: usize,
    event_buffers: usize,
    tuples_per_part: usize,
    fault: Option<Fault>,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            connections: 1,
            migrations: 1,
            resets: 0,
            moves: true,
            lacks_memory: false,
            guest_bytes: 0,
            host_bytes: 0,
            window: 2,
            guest_connects: 0,
            host_connects: 0,
            guest_closes: 0,
            host_closes: 0,
            tx_room: 1,
            event_buffers: 1,
            tuples_per_part: 1,
            fault: None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    driver: Driver,
    device: Device,
    queues: Queues,
    guest_connects: u8,
    host_connects: u8,
    guest_closes: u8,
    host_closes: u8,
    next_id: u8,
    /// What was seen that must never happen.
    violation: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Driver(DriverStep),
    Device(DeviceStep),
    GuestWrites(usize),
    GuestCloses(usize),
    /// It has no memory to tell the host.
    GuestForgets(usize),
    GuestMakesRequest,
    GuestSendsRequest,
    HostWrites(usize),
    HostCloses(usize),
    /// From a port of the host.
    HostConnects(u32),
    /// The ends that are listed.
    Migrate(Vec<u8>),
    Reset,
}

impl World {
    /// Whether nothing happens before an application or another migration makes it.
    fn is_settled(&self, scenario: &Scenario) -> bool {
        let (mut driver, mut device) = (Vec::new(), Vec::new());
        self.driver.steps(&self.queues, scenario, &mut driver);
        self.device.steps(&self.queues, scenario, &mut device);
        driver.is_empty() && device.is_empty() && self.driver.prepared.is_none()
    }

    /// The connections of which both ends are there.
    fn pairs(&self) -> impl Iterator<Item = (&Socket, &End)> {
        self.driver.sockets.iter().filter_map(|socket| {
            let mut ends = self.device.ends.iter();
            Some((socket, ends.find(|end| end.id == socket.id)?))
        })
    }
}

impl Model for Scenario {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let (guest_cid, host_cid) = (cid(GUEST_CID), cid(HOST_CID));
        let mut world = World {
            driver: Driver::new(guest_cid),
            device: Device::new(guest_cid, host_cid, self.migrations, self.resets),
            queues: Queues::default(),
            guest_connects: self.guest_connects,
            host_connects: self.host_connects,
            guest_closes: self.guest_closes,
            host_closes: self.host_closes,
            next_id: self.connections,
            violation: None,
        };
        for id in 0..self.connections {
            let (cids, state) = ((guest_cid, host_cid), State::Established);
            let ports = (HOST_PORT + u32::from(id), LISTENER);
            let mut socket = Socket::new(id, state, cids, ports, self.window);
            let mut end = End::new(id, state, cids, ports, self.window);
            socket.send.update(self.window, 0);
            socket.receive.advertised();
            end.send.update(self.window, 0);
            end.receive.advertised();
            world.driver.sockets.push(socket);
            world.device.ends.push(end);
        }
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.violation.is_some() {
            return;
        }
        let (mut driver, mut device) = (Vec::new(), Vec::new());
        world.driver.steps(&world.queues, self, &mut driver);
        world.device.steps(&world.queues, self, &mut device);
        actions.extend(driver.into_iter().map(Action::Driver));
        actions.extend(device.into_iter().map(Action::Device));
        for (at, socket) in world.driver.sockets.iter().enumerate() {
            if world.driver.can_send(at, self) {
                actions.push(Action::GuestWrites(at));
            }
            let can_close = socket.state == State::Established && !socket.is_closed;
            if world.guest_closes > 0 && can_close {
                actions.push(Action::GuestCloses(at));
            }
            if self.lacks_memory && world.device.migrations > 0 {
                actions.push(Action::GuestForgets(at));
            }
        }
        if world.guest_connects > 0 && world.driver.prepared.is_none() {
            actions.push(Action::GuestMakesRequest);
        }
        if world.driver.prepared.is_some() {
            actions.push(Action::GuestSendsRequest);
        }
        for (at, end) in world.device.ends.iter().enumerate() {
            if world.device.can_send(at, self) {
                actions.push(Action::HostWrites(at));
            }
            let can_close = end.state == State::Established && !end.is_closed;
            if world.host_closes > 0 && can_close {
                actions.push(Action::HostCloses(at));
            }
        }
        if world.host_connects > 0 {
            // Also from a port of a connection that is over, as far as the host knows.
            for port in [HOST_PORT, HOST_PORT + 9] {
                if world.device.is_free((port, LISTENER)) {
                    actions.push(Action::HostConnects(port));
                }
            }
        }
        if world.device.migrations > 0 {
            let listable = world.device.listable();
            for chosen in 0..1_u8 << listable.len() {
                let is_chosen = |at: &usize| (chosen >> at) & 1 != 0;
                let listed = (0..listable.len()).filter(is_chosen);
                actions.push(Action::Migrate(listed.map(|at| listable[at]).collect()));
            }
        }
        if world.device.resets > 0 {
            actions.push(Action::Reset);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut world = world.clone();
        let next_id = world.next_id;
        let World {
            driver,
            device,
            queues,
            ..
        } = &mut world;
        let result = match action {
            Action::Driver(step) => driver.act(step, queues, device.configuration(), self),
            Action::Device(step) => device.act(step, queues, self),
            Action::GuestWrites(at) => {
                driver.write(at, queues, self);
                Ok(())
            }
            Action::GuestCloses(at) => {
                driver.close(at, queues, self);
                world.guest_closes -= 1;
                Ok(())
            }
            Action::GuestForgets(at) => {
                driver.end_without_memory(at, queues, self);
                Ok(())
            }
            Action::GuestMakesRequest => {
                driver.prepare_request(next_id, cid(HOST_CID), SERVICE, self);
                world.next_id += 1;
                world.guest_connects -= 1;
                Ok(())
            }
            Action::GuestSendsRequest => {
                driver.request(queues, self);
                Ok(())
            }
            Action::HostWrites(at) => {
                device.write(at);
                Ok(())
            }
            Action::HostCloses(at) => {
                device.close(at);
                world.host_closes -= 1;
                Ok(())
            }
            Action::HostConnects(port) => {
                device.connect(next_id, (port, LISTENER), self);
                world.next_id += 1;
                world.host_connects -= 1;
                Ok(())
            }
            Action::Migrate(listed) => {
                device.migrate(&listed, self);
                Ok(())
            }
            Action::Reset => {
                device.reset(self);
                Ok(())
            }
        };
        world.violation = result.err();
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(
                "each byte comes once, in order, on its connection",
                |scenario: &Scenario, world: &World| {
                    world.violation.is_none()
                        && (!world.is_settled(scenario)
                            || world.pairs().all(|(socket, end)| {
                                (socket.sent, end.sent) == (end.received, socket.received)
                            }))
                },
            ),
            Property::always(
                "no connection hangs",
                |scenario: &Scenario, world: &World| {
                    !world.is_settled(scenario)
                        || world.device.ends.iter().all(|end| !end.is_held())
                            && world.pairs().all(|(socket, end)| {
                                socket.send.available(u32::MAX) > 0
                                    && end.send.available(u32::MAX) > 0
                            })
                },
            ),
            Property::always(
                "what is over looks so from both ends",
                |scenario: &Scenario, world: &World| {
                    let pairs = world.pairs().filter(|(socket, end)| {
                        (socket.guest_cid, socket.host_cid) == end.present()
                            && !socket.is_closed
                            && !end.is_closed
                    });
                    let is_told_later = scenario.lacks_memory && world.device.migrations > 0;
                    !world.is_settled(scenario)
                        || is_told_later
                        || pairs.count() == world.driver.sockets.len()
                            && world.driver.sockets.len() == world.device.ends.len()
                },
            ),
            Property::always(
                "each attempt to connect is answered",
                |scenario: &Scenario, world: &World| {
                    let sockets = world.driver.sockets.iter().map(|socket| socket.state);
                    let ends = world.device.ends.iter().map(|end| end.state);
                    !world.is_settled(scenario)
                        || sockets.chain(ends).all(|state| state != State::Connecting)
                },
            ),
            Property::always(
                "no update is refused",
                |scenario: &Scenario, world: &World| {
                    world.driver.refused == 0 || scenario.lacks_memory
                },
            ),
            Property::sometimes(
                "a connection goes on",
                |scenario: &Scenario, world: &World| {
                    world.device.migrations == 0
                        && world.is_settled(scenario)
                        && (scenario.connections == 0
                            || world.pairs().any(|(socket, end)| {
                                socket.id < scenario.connections
                                    && socket.sent == scenario.guest_bytes
                                    && end.sent == scenario.host_bytes
                            }))
                },
            ),
            Property::sometimes("attempts succeed", |scenario: &Scenario, world: &World| {
                let made = world.driver.sockets.iter();
                let made = made.filter(|socket| socket.id >= scenario.connections);
                let attempts = scenario.guest_connects + scenario.host_connects;
                world.device.migrations == 0
                    && world.device.resets == 0
                    && world.is_settled(scenario)
                    // The host has two ports to connect from.
                    && made.count() == usize::from(attempts.min(2))
            }),
        ]
    }
}

/// Explores a scenario, and says how many states it has.
fn explore(name: &str, scenario: Scenario) {
    let began = std::time::Instant::now();
    let checker = scenario.checker().threads(2).spawn_bfs().join();
    println!(
        "{name}: {} states, the deepest after {} steps, {:.1} s",
        checker.unique_state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f32()
    );
    checker.assert_properties();
}

fn streams() -> Scenario {
    Scenario {
        migrations: 2,
        guest_bytes: 2,
        host_bytes: 2,
        window: 1,
        ..Scenario::default()
    }
}

fn attempts() -> Scenario {
    Scenario {
        guest_connects: 1,
        host_connects: 1,
        guest_bytes: 1,
        ..Scenario::default()
    }
}

fn closes() -> Scenario {
    Scenario {
        connections: 2,
        guest_closes: 1,
        host_closes: 1,
        guest_bytes: 1,
        ..Scenario::default()
    }
}

/// Two connections whose updates have two parts.
fn two_streams() -> Scenario {
    Scenario {
        connections: 2,
        guest_bytes: 1,
        host_bytes: 1,
        window: 1,
        ..Scenario::default()
    }
}

fn no_memory() -> Scenario {
    Scenario {
        connections: 2,
        migrations: 2,
        lacks_memory: true,
        ..Scenario::default()
    }
}

fn same_cids(scenario: Scenario) -> Scenario {
    Scenario {
        moves: false,
        ..scenario
    }
}

fn resets() -> Scenario {
    Scenario {
        resets: 1,
        ..streams()
    }
}

/// Two connections whose updates have two parts, of which a reset may take the place of the second.
fn resets_amid_parts() -> Scenario {
    Scenario {
        migrations: 2,
        resets: 1,
        host_bytes: 0,
        ..two_streams()
    }
}

fn attempts_and_reset() -> Scenario {
    Scenario {
        resets: 1,
        guest_bytes: 0,
        ..attempts()
    }
}

/// Attempts of the guest, among them ones whose answers bear a CID that the guest never reads.
fn two_resets() -> Scenario {
    Scenario {
        connections: 0,
        resets: 2,
        guest_connects: 2,
        guest_bytes: 1,
        ..Scenario::default()
    }
}

/// Attempts of the host, perhaps from the same port, with the same CIDs.
fn attempts_of_the_host() -> Scenario {
    Scenario {
        connections: 0,
        resets: 1,
        moves: false,
        host_connects: 3,
        guest_bytes: 1,
        ..Scenario::default()
    }
}

fn attempt_without_memory() -> Scenario {
    Scenario {
        connections: 1,
        migrations: 2,
        guest_connects: 1,
        ..no_memory()
    }
}

/// Data both ways, credit for one byte, and two migrations, of which the second may come before the first is answered.
#[test]
fn streams_go_on() {
    explore("streams", streams());
}

#[test]
fn streams_go_on_where_no_cid_changes() {
    explore(
        "streams, same CIDs",
        Scenario {
            moves: false,
            ..streams()
        },
    );
}

#[test]
fn streams_beside_each_other_go_on() {
    explore("two streams", two_streams());
}

/// An attempt of the guest and one of the host, perhaps from the port of a connection that was.
#[test]
fn attempts_are_answered() {
    explore("attempts", attempts());
}

#[test]
fn attempts_are_answered_over_two_migrations() {
    let scenario = Scenario {
        migrations: 2,
        guest_bytes: 0,
        host_connects: 0,
        ..attempts()
    };
    explore("attempts, two migrations", scenario);
}

#[test]
fn attempts_are_answered_where_no_cid_changes() {
    explore(
        "attempts, same CIDs",
        Scenario {
            moves: false,
            ..attempts()
        },
    );
}

#[test]
fn closes_come_through() {
    explore("closes", closes());
}

#[test]
fn closes_come_through_two_migrations() {
    let scenario = Scenario {
        connections: 1,
        migrations: 2,
        ..closes()
    };
    explore("closes, two migrations", scenario);
}

/// Updates in two parts, for which the guest may lack the memory at any of them.
#[test]
fn refused_updates_end_connections() {
    explore("no memory", no_memory());
}

/// A transport reset before, between or after two migrations, perhaps while an update is on its way.
#[test]
fn resets_end_streams() {
    explore("streams, a reset", resets());
}

#[test]
fn resets_end_streams_where_no_cid_changes() {
    explore("streams, a reset, same CIDs", same_cids(resets()));
}

#[test]
fn resets_end_updates_that_have_begun() {
    explore("two streams, a reset", resets_amid_parts());
}

#[test]
fn resets_end_updates_that_have_begun_where_no_cid_changes() {
    explore(
        "two streams, a reset, same CIDs",
        same_cids(resets_amid_parts()),
    );
}

#[test]
fn attempts_are_answered_over_a_reset() {
    explore("attempts, a reset", attempts_and_reset());
}

#[test]
fn attempts_are_answered_over_a_reset_where_no_cid_changes() {
    explore(
        "attempts, a reset, same CIDs",
        same_cids(attempts_and_reset()),
    );
}

#[test]
fn attempts_are_answered_over_two_resets() {
    explore("attempts of the guest, two resets", two_resets());
}

#[test]
fn attempts_are_answered_over_two_resets_where_no_cid_changes() {
    explore(
        "attempts of the guest, two resets, same CIDs",
        same_cids(two_resets()),
    );
}

#[test]
fn attempts_of_the_host_are_told_apart() {
    explore("attempts of the host", attempts_of_the_host());
}

#[test]
fn attempts_are_answered_without_memory_for_an_update() {
    explore("an attempt, no memory", attempt_without_memory());
}

#[test]
fn attempts_are_answered_without_memory_for_an_update_where_no_cid_changes() {
    explore(
        "an attempt, no memory, same CIDs",
        same_cids(attempt_without_memory()),
    );
}

/// That the checker finds what a fault leads to.
fn finds(fault: Fault, scenario: Scenario) {
    let scenario = Scenario {
        fault: Some(fault),
        ..scenario
    };
    let checker = scenario
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let failed: Vec<_> = checker
        .model()
        .properties()
        .into_iter()
        .filter(|property| property.expectation == Expectation::Always)
        .filter_map(|property| Some((property.name, checker.discovery(property.name)?)))
        .collect();
    println!("{fault:?}: {} states", checker.unique_state_count());
    for (name, path) in &failed {
        println!("  not so: {name}, after {:?}", path.clone().into_actions());
    }
    assert!(!failed.is_empty(), "{fault:?} is not found");
}

macro_rules! faults_are_found {
    ($($name:ident: $fault:ident in $scenario:expr,)*) => {
        $(
            #[test]
            fn $name() {
                finds(Fault::$fault, $scenario);
            }
        )*
    };
}

faults_are_found! {
    finds_an_update_applied_before_packets_of_before: IgnoresRxUsed in streams(),
    finds_packets_handled_before_their_event: LooksAtEventsLater in attempts(),
    finds_unlisted_connections_that_go_on: KeepsUnlisted in streams(),
    finds_packets_that_keep_old_addresses: LeavesOldAddresses in streams(),
    finds_an_answer_behind_packets: AnswersLast in streams(),
    finds_missing_connections_that_are_not_answered: LeavesMissingUnanswered in no_memory(),
    finds_answers_forgotten: ForgetsAnswers in no_memory(),
    finds_refused_tuples_that_are_not_answered: LeavesRefusedUnanswered in no_memory(),
    finds_connections_that_outlive_a_refusal: KeepsConnectionsSinceRefusal in same_cids(attempt_without_memory()),
    finds_parts_kept_over_a_reset: KeepsPartsAtReset in resets_amid_parts(),
    finds_connections_kept_over_a_reset: KeepsConnectionsAtReset in resets(),
    finds_a_cid_kept_over_a_reset: KeepsCidAtReset in resets(),
    finds_old_answers_dropped: DropsOldAnswers in attempts_and_reset(),
    finds_old_responses_trusted: TrustsResponses in same_cids(attempts_and_reset()),
    finds_packets_that_overtake_an_update: PacketsOvertakeUpdates in attempts(),
    finds_a_wrong_count_of_buffers: CountsNoBuffers in streams(),
    finds_old_packets_dropped_before_the_answer: DropsOldPackets in streams(),
    finds_old_requests_dropped: DropsOldRequests in attempts(),
    finds_requests_forgotten_by_a_migration: ForgetsRequests in attempts(),
    finds_requests_forgotten_by_a_reset: ForgetsRequests in two_resets(),
    finds_packets_that_overtake_a_reset: PacketsOvertakeResets in attempts_and_reset(),
    finds_ends_kept_over_a_reset: KeepsEndsAtReset in resets(),
    finds_addresses_used_again: ReusesAddresses in attempts_of_the_host(),
    finds_written_bytes_lost: LosesWhatWaits in streams(),
}
