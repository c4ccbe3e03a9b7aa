// SPDX-License-Identifier: GPL-2.0

//! Credit counts right, whatever the peer claims: the model of the property tests, driven by the fuzzer.

#![no_main]

#[path = "../../tests/model/mod.rs"]
mod model;

use libfuzzer_sys::fuzz_target;
use model::{Operation, Receiver, Sender};

fuzz_target!(|run: (u32, Vec<Operation>)| {
    let (beginning, operations) = run;
    let mut sender = Sender::after(beginning);
    let mut receiver = Receiver::after(beginning);
    for operation in operations {
        sender.apply(operation);
        receiver.apply(operation);
    }
});
