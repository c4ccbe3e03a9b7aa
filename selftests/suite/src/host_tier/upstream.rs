// SPDX-License-Identifier: GPL-2.0

//! Upstream's `vsock_test` of the kernel under test: which tests it has, and what its output says about each.
//!
//! `vsock_test` runs once on either side of the connection, and both print the same lines: `<id> - <name>...`, then
//! whatever the test has to say, then `ok` or `skipped`. The first failure ends both processes. A test is therefore
//! ok when both sides say so, and what follows a failure has to be run anew.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{bail, Context, Result};

/// What the guest, which has the driver under test, is in a run of `vsock_test`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The guest listens, the host connects.
    GuestServer,
    /// The guest connects, the host listens.
    GuestClient,
}

impl Role {
    /// Both, in the order in which they are run.
    pub const BOTH: [Role; 2] = [Role::GuestServer, Role::GuestClient];
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::GuestServer => "guest_server",
            Role::GuestClient => "guest_client",
        })
    }
}

/// One test of upstream's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTest {
    /// Its number, by which `--skip` and the output name it.
    pub id: u32,
    /// Its name as upstream writes it.
    pub name: String,
}

impl UpstreamTest {
    /// The name under which our summary shows it: `host_tier::guest_server::sock_stream_shut_wr`.
    pub fn full_name(&self, role: Role) -> String {
        let mut slug = String::with_capacity(self.name.len());
        for c in self.name.chars() {
            if c.is_ascii_alphanumeric() {
                slug.push(c.to_ascii_lowercase());
            } else if !slug.ends_with('_') {
                slug.push('_');
            }
        }
        format!("host_tier::{role}::{}", slug.trim_end_matches('_'))
    }
}

/// Reads the output of `vsock_test --list`: a heading, then `<id>\t<name>`.
pub fn parse_list(output: &str) -> Result<Vec<UpstreamTest>> {
    let tests = output
        .lines()
        .skip(1)
        .map(|line| {
            let (id, name) = line
                .split_once('\t')
                .with_context(|| format!("no tab in {line:?}"))?;
            Ok(UpstreamTest {
                id: id
                    .parse()
                    .with_context(|| format!("no test number in {line:?}"))?,
                name: name.to_owned(),
            })
        })
        .collect::<Result<Vec<_>>>()
        .context("reading the output of vsock_test --list")?;
    if tests.is_empty() {
        bail!("vsock_test --list names no test");
    }
    Ok(tests)
}

/// What one side said about one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// The test ended well.
    Ok,
    /// This side or the other was told to skip it.
    Skipped,
    /// It began and did not end; with all that it printed.
    Unfinished(String),
}

/// What one side said about each test that it began, by test number.
pub type Sayings = BTreeMap<u32, Said>;

/// Reads what one side printed.
pub fn parse_output(output: &str) -> Sayings {
    let mut said = Sayings::new();
    let mut current: Option<(u32, String)> = None;
    for line in output.lines() {
        let text = match parse_heading(line) {
            Some((id, rest)) => {
                current = Some((id, String::new()));
                rest
            }
            None => line,
        };
        let Some((id, printed)) = &mut current else {
            continue;
        };
        match text {
            "ok" => {
                said.insert(*id, Said::Ok);
                current = None;
            }
            "skipped" => {
                said.insert(*id, Said::Skipped);
                current = None;
            }
            _ => {
                if !printed.is_empty() {
                    printed.push('\n');
                }
                printed.push_str(text);
                said.insert(*id, Said::Unfinished(printed.clone()));
            }
        }
    }
    said
}

/// `<id> - <name>...<rest>` gives the id and the rest.
fn parse_heading(line: &str) -> Option<(u32, &str)> {
    let (id, rest) = line.split_once(" - ")?;
    let id = id.parse().ok()?;
    let (_, rest) = rest.split_once("...")?;
    Some((id, rest))
}

/// The verdict on one test, from what both sides said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Ok on both sides.
    Ok,
    /// Begun, and not ok on both sides; with what they printed.
    Failed(String),
    /// Begun on one side at most: that side waits for the other, which has ended.
    NotBegun,
}

/// Puts together what the host and the guest said about the test `id`.
pub fn verdict(id: u32, host: &Sayings, guest: &Sayings) -> Verdict {
    fn describe(said: &Said) -> String {
        match said {
            Said::Ok => "ok".to_owned(),
            Said::Skipped => "skipped it".to_owned(),
            Said::Unfinished(text) if text.is_empty() => "did not finish it".to_owned(),
            Said::Unfinished(text) => format!("did not finish it: {text}"),
        }
    }
    match (host.get(&id), guest.get(&id)) {
        (None, _) | (_, None) => Verdict::NotBegun,
        (Some(Said::Ok), Some(Said::Ok)) => Verdict::Ok,
        (Some(host), Some(guest)) => Verdict::Failed(format!(
            "guest: {}\nhost:  {}",
            describe(guest),
            describe(host)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        "ID\tTest name\n0\tSOCK_STREAM connection reset\n1\tSOCK_STREAM poll() + SO_RCVLOWAT\n";

    #[test]
    fn a_list_gives_numbers_and_names() {
        let tests = parse_list(LIST).unwrap();
        assert_eq!(tests.len(), 2);
        assert_eq!(tests[1].id, 1);
        assert_eq!(
            tests[1].full_name(Role::GuestClient),
            "host_tier::guest_client::sock_stream_poll_so_rcvlowat"
        );
    }

    #[test]
    fn an_empty_or_garbled_list_is_an_error() {
        assert!(parse_list("ID\tTest name\n").is_err());
        assert!(parse_list("ID\tTest name\nvsock_test: not found\n").is_err());
    }

    #[test]
    fn each_line_tells_of_one_test() {
        let said = parse_output(
            "Control socket listening on 0.0.0.0:1234\n\
             Control socket connection accepted...\n\
             0 - SOCK_STREAM connection reset...ok\n\
             6 - SOCK_SEQPACKET msg bounds...skipped\n\
             29 - SOCK_STREAM transport release use-after-free...Setup unsupported: sole virtio transport\n\
             ok\n\
             30 - SOCK_STREAM retry failed connect()...connect: Connection reset by peer\n",
        );
        assert_eq!(said.len(), 4);
        assert_eq!(said[&0], Said::Ok);
        assert_eq!(said[&6], Said::Skipped);
        assert_eq!(said[&29], Said::Ok);
        assert_eq!(
            said[&30],
            Said::Unfinished("connect: Connection reset by peer".into())
        );
    }

    #[test]
    fn a_test_is_ok_when_both_sides_say_so() {
        let host = parse_output("0 - a...ok\n1 - b...ok\n2 - c...skipped\n3 - d...");
        let guest =
            parse_output("0 - a...ok\n1 - b...read: Connection reset by peer\n2 - c...skipped\n");
        assert_eq!(verdict(0, &host, &guest), Verdict::Ok);
        assert_eq!(
            verdict(1, &host, &guest),
            Verdict::Failed(
                "guest: did not finish it: read: Connection reset by peer\nhost:  ok".into()
            )
        );
        assert_eq!(
            verdict(2, &host, &guest),
            Verdict::Failed("guest: skipped it\nhost:  skipped it".into())
        );
        assert_eq!(verdict(3, &host, &guest), Verdict::NotBegun);
        assert_eq!(verdict(4, &host, &guest), Verdict::NotBegun);
    }
}
