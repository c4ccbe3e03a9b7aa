// SPDX-License-Identifier: GPL-2.0

//! The program on the host: stores what agents send, and acknowledges what is safe on the disk.

use std::io::BufReader;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use clap::Args;
use socket2::Socket;

use crate::endpoint::Endpoint;
use crate::lock;
use crate::message::{self, FromAgent, FromCollector};
use crate::store::Store;

/// How much is acknowledged at once, in bytes, where it comes without a pause.
const MAX_UNSAFE: u64 = 256 * 1024;

#[derive(Args)]
pub struct Options {
    /// Where to wait for agents: vsock:PORT, or unix:PATH_PORT of a device that bridges to Unix sockets; may be given
    /// several times
    #[arg(long, required = true)]
    listen: Vec<Endpoint>,
    /// The folder to store streams in
    #[arg(long)]
    store: PathBuf,
}

pub fn run(options: &Options) -> Result<()> {
    let store = Arc::new(Store::open(&options.store)?);
    let mut threads = Vec::new();
    for endpoint in &options.listen {
        let (listener, store) = (endpoint.listen()?, store.clone());
        println!("listening at {endpoint}");
        threads.push(thread::spawn(move || accept(&listener, &store)));
    }
    for thread in threads {
        // They do not end.
        let _ = thread.join();
    }
    Ok(())
}

fn accept(listener: &Socket, store: &Arc<Store>) {
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                let store = store.clone();
                thread::spawn(move || serve(&socket, &store));
            }
            Err(error) => {
                eprintln!("vsock-forwarder: waiting for agents: {error}");
                // Whatever is short may be there later.
                thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn serve(socket: &Socket, store: &Store) {
    if let Err(error) = collect(socket, store) {
        let reason = format!("{error:#}");
        eprintln!("vsock-forwarder: an agent: {reason}");
        // Where the connection is lost there is nobody to tell.
        let _ = message::write(socket, &FromCollector::Refused { reason }, &[]);
    }
}

/// Serves an agent until it ends the connection.
fn collect(socket: &Socket, store: &Store) -> Result<()> {
    let mut from = BufReader::new(socket.try_clone().context("sharing a socket")?);
    let (stream, boot) = match message::read(&mut from)? {
        Some(FromAgent::Hello { stream, boot }) => (stream, boot),
        Some(other) => bail!("{other:?} comes before hello"),
        None => return Ok(()),
    };
    let (stored, boot) = store.stream(&stream, &boot)?;
    let offset = lock(&stored).sync()?;
    message::write(socket, &FromCollector::Welcome { boot, offset }, &[])?;
    while let Some(FromAgent::Data { offset, len }) = message::read(&mut from)? {
        let payload = message::read_payload(&mut from, len)?;
        // An earlier connection of this agent may be about to end, and writes as well: what it has is the same.
        let mut stored = lock(&stored);
        stored.write(offset, &payload)?;
        if from.buffer().is_empty() || stored.unsafe_bytes() >= MAX_UNSAFE {
            let offset = stored.sync()?;
            drop(stored);
            message::write(socket, &FromCollector::Stored { offset }, &[])?;
        }
    }
    Ok(())
}
