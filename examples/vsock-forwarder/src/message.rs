// SPDX-License-Identifier: GPL-2.0

//! What agent and collector say to each other.
//!
//! Each message is a line of JSON; behind a `data` come so many bytes of payload as it says.
//!
//! | from | message | means |
//! | --- | --- | --- |
//! | agent | `{"hello":{"stream":"journal","boot":"..."}}` | the first: who it is, and which boot of its guest this is |
//! | collector | `{"welcome":{"boot":"...","offset":4096}}` | which boot it has stored last of this stream, and how much of this one |
//! | agent | `{"data":{"offset":4096,"len":100}}` and the bytes | what stands at this offset of the stream |
//! | collector | `{"stored":{"offset":4196}}` | all before this offset is safe on the disk |
//! | collector | `{"refused":{"reason":"..."}}` | the last: what the agent said cannot be |
//!
//! A stream's bytes have the same offsets over all connections of a boot, and each boot begins at 0. So the agent can send
//! again what was not acknowledged, and the collector knows what it has.

use std::io::{BufRead, Read, Write};

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

/// The longest line of a message, in bytes.
const MAX_LINE: u64 = 1024;

/// The largest payload of a `data`, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// A message of an agent.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromAgent {
    Hello { stream: String, boot: String },
    Data { offset: u64, len: usize },
}

/// A message of a collector.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromCollector {
    Welcome { boot: Option<String>, offset: u64 },
    Stored { offset: u64 },
    Refused { reason: String },
}

/// Writes a message, and its payload in the same call where it has one.
pub fn write(mut to: impl Write, message: &impl Serialize, payload: &[u8]) -> Result<()> {
    let mut bytes = serde_json::to_vec(message)?;
    bytes.push(b'\n');
    bytes.extend(payload);
    Ok(to.write_all(&bytes)?)
}

/// Reads a message; `None` at the end of the connection.
pub fn read<T: for<'a> Deserialize<'a>>(from: &mut impl BufRead) -> Result<Option<T>> {
    let mut line = Vec::new();
    from.take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&line);
    ensure!(text.ends_with('\n'), "the message {text:?} has no end");
    serde_json::from_str(&text)
        .with_context(|| format!("the message {text:?}"))
        .map(Some)
}

/// Reads the payload of a `data`.
pub fn read_payload(from: &mut impl Read, len: usize) -> Result<Vec<u8>> {
    ensure!(
        len <= MAX_PAYLOAD,
        "a payload of {len} bytes, more than {MAX_PAYLOAD}"
    );
    let mut payload = vec![0; len];
    from.read_exact(&mut payload).context("reading a payload")?;
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_as_they_were_sent() {
        let mut wire = Vec::new();
        let hello = FromAgent::Hello {
            stream: "journal".to_owned(),
            boot: "b".to_owned(),
        };
        let data = FromAgent::Data { offset: 7, len: 3 };
        write(&mut wire, &hello, &[]).unwrap();
        write(&mut wire, &data, b"\n{}").unwrap();
        let mut from = wire.as_slice();
        assert_eq!(read(&mut from).unwrap(), Some(hello));
        assert_eq!(read(&mut from).unwrap(), Some(data));
        assert_eq!(read_payload(&mut from, 3).unwrap(), b"\n{}");
        assert_eq!(read::<FromAgent>(&mut from).unwrap(), None);
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let endless = vec![b'x'; 4096];
        for wire in [
            &b"{\"data\":{\"offset\":1"[..],
            b"GET /\n",
            b"{\"data\":{\"offset\":-1,\"len\":1}}\n",
            &endless,
        ] {
            assert!(read::<FromAgent>(&mut &wire[..]).is_err());
        }
        assert!(read_payload(&mut &endless[..], MAX_PAYLOAD + 1).is_err());
        assert!(read_payload(&mut &endless[..10], 11).is_err());
    }
}
