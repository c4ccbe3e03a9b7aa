// SPDX-License-Identifier: GPL-2.0

//! Upstream's test programs of the kernel under test: which tests `vsock_test` has, how they run on two machines, and what
//! their output says about each test.
//!
//! A program runs once on either side of the connection, and both print the same lines: `<id> - <name>...`, then
//! whatever the test has to say, then `ok` or `skipped`. The first failure ends both processes. A test is therefore
//! ok when both sides say so, and what follows a failure has to be run anew.

use std::collections::BTreeMap;
use std::fmt;
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::agent::{sh, sh_ok, Agent, Ended};
use crate::machine::Env;

/// How much longer the agents may take to say that it was stopped.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// The vsock ports of the first run of `vsock_test`, and how many it has.
const FIRST_PEER_PORT: u32 = 1234;
const PEER_PORTS: u32 = 2;

/// This test interrupts connect() over and over. Its last requests can still be on their way to its port when it ends,
/// and the listener of the next test there would accept them instead of that test's connection, with either driver.
/// Each run of `vsock_test` has ports of its own, and this test is the last of its run.
const LEAVES_REQUESTS: &str = "SOCK_STREAM transport change null-ptr-deref, lockdep warn";

/// A test says this where its timeout of 1 s comes 250 ms late, as it may on busy processors: it is run again, at most
/// so many times.
const TOLD_LATE: &str = "too much time in read(2)";
const MOST_TOLD_LATE: u32 = 5;

/// What is said of a test that was not run to its end.
pub const NOT_ENDED: &str = "did not come to its end";

/// Upstream's other programs, which run all of their tests. The first wants that no other socket is there.
pub const OTHER_PROGRAMS: [&str; 2] = ["vsock_diag_test", "vsock_uring_test"];

/// The program that has the most tests.
pub const VSOCK_TEST: &str = "vsock_test";

/// What a test says that ends well and has tested nothing, for the modules that it needs are not there.
const TESTED_NOTHING: [&str; 4] = [
    "No transports detected",
    "No transports tested",
    "Setup unsupported",
    "Test skipped",
];

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

/// Upstream's tests, as upstream's program names them. That much of it runs without a socket.
pub fn tests(env: &Env) -> Result<Vec<UpstreamTest>> {
    let program = env.upstream.join(VSOCK_TEST);
    let output = Command::new(&program)
        .arg("--list")
        .output()
        .with_context(|| format!("running {} --list", program.display()))?;
    parse_list(&String::from_utf8_lossy(&output.stdout))
}

/// Reads the output of `vsock_test --list`: a heading, then `<id>\t<name>`.
fn parse_list(output: &str) -> Result<Vec<UpstreamTest>> {
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
enum Said {
    /// The test ended well.
    Ok,
    /// This side or the other was told to skip it, or it has tested nothing.
    Skipped,
    /// It began and did not end; with all that it printed.
    Unfinished(String),
}

/// What one side said about each test that it began, by test number.
type Sayings = BTreeMap<u32, Said>;

/// Reads what one side printed.
fn parse_output(output: &str) -> Sayings {
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
                let is_empty = TESTED_NOTHING.iter().any(|text| printed.contains(text));
                said.insert(*id, if is_empty { Said::Skipped } else { Said::Ok });
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
enum Verdict {
    /// Ok on both sides.
    Ok,
    /// Begun, and not ok on both sides; with what they printed.
    Failed(String),
    /// Begun on one side at most: that side waits for the other, which has ended.
    NotBegun,
}

/// Puts together what both sides said about the test `id`.
fn verdict(id: u32, server: (&str, &Sayings), client: (&str, &Sayings)) -> Verdict {
    fn describe((name, said): (&str, &Said)) -> String {
        let said = match said {
            Said::Ok => "ok".to_owned(),
            Said::Skipped => "skipped it".to_owned(),
            Said::Unfinished(text) if text.is_empty() => "did not finish it".to_owned(),
            Said::Unfinished(text) => format!("did not finish it: {text}"),
        };
        format!("{name}: {said}")
    }
    match (server.1.get(&id), client.1.get(&id)) {
        (None, _) | (_, None) => Verdict::NotBegun,
        (Some(Said::Ok), Some(Said::Ok)) => Verdict::Ok,
        (Some(by_server), Some(by_client)) => Verdict::Failed(format!(
            "{}\n{}",
            describe((server.0, by_server)),
            describe((client.0, by_client))
        )),
    }
}

/// A machine that one of upstream's programs runs on.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// What it is called where something is said of it.
    pub name: &'static str,
    pub agent: &'a Agent,
    pub cid: u32,
}

/// Two machines, and how the client's program reaches the server's over TCP.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    pub server: Side<'a>,
    pub client: Side<'a>,
    pub control_host: &'a str,
    pub control_port: u32,
    /// How long a program may take.
    pub limit: Duration,
}

/// What both sides of one run of a program said.
#[derive(Default)]
struct PairSaid {
    server: Sayings,
    client: Sayings,
    /// What went wrong beside the tests, a new line each.
    trouble: String,
    /// Whether a machine does not answer any more.
    lost: bool,
}

impl Pair<'_> {
    /// Runs tests of `vsock_test`. Gives those that failed, with what was said of them, and whether a machine was lost over
    /// them.
    ///
    /// The first failure ends `vsock_test`, so the tests after it are run by another; and so are those after a test that
    /// leaves packets behind.
    pub fn run_tests(&self, tests: &[&UpstreamTest]) -> (BTreeMap<u32, String>, bool) {
        let mut failed = BTreeMap::new();
        let mut told_late = BTreeMap::<u32, u32>::new();
        let mut remaining = tests.to_vec();
        let mut peer_port = FIRST_PEER_PORT;
        while !remaining.is_empty() {
            let end = remaining
                .iter()
                .position(|test| test.name == LEAVES_REQUESTS);
            let now = &remaining[..end.map_or(remaining.len(), |end| end + 1)];
            let picked: Vec<String> = now
                .iter()
                .map(|test| format!("--pick {}", test.id))
                .collect();
            let said = self.run(VSOCK_TEST, peer_port, &picked.join(" "));
            peer_port += PEER_PORTS;
            let mut done = Vec::new();
            let mut is_any_late = false;
            for test in now {
                let server = (self.server.name, &said.server);
                match verdict(test.id, server, (self.client.name, &said.client)) {
                    Verdict::Ok => (),
                    Verdict::Failed(text)
                        if text.contains(TOLD_LATE)
                            && *told_late.entry(test.id).or_default() < MOST_TOLD_LATE =>
                    {
                        *told_late.entry(test.id).or_default() += 1;
                        println!("note: {}: {TOLD_LATE}; run once more", test.name);
                        is_any_late = true;
                        continue;
                    }
                    Verdict::Failed(text) => {
                        failed.insert(test.id, format!("{text}{}", said.trouble));
                    }
                    Verdict::NotBegun => continue,
                }
                done.push(test.id);
            }
            let nothing_done = done.is_empty() && !is_any_late;
            remaining.retain(|test| !done.contains(&test.id));
            if said.lost || nothing_done {
                for test in &remaining {
                    failed.insert(test.id, format!("{NOT_ENDED}{}", said.trouble));
                }
                return (failed, said.lost);
            }
        }
        (failed, false)
    }

    /// Runs all tests of another program; fails with what was said where not all were ok on both sides.
    pub fn run_all_of(&self, program: &str) -> Result<(), String> {
        let said = self.run(program, FIRST_PEER_PORT, "");
        let are_ok =
            |said: &Sayings| !said.is_empty() && said.values().all(|said| *said == Said::Ok);
        if are_ok(&said.server) && are_ok(&said.client) && said.server.len() == said.client.len() {
            return Ok(());
        }
        Err(format!(
            "{}: {:?}\n{}: {:?}{}",
            self.server.name, said.server, self.client.name, said.client, said.trouble
        ))
    }

    /// Runs a program on both sides.
    fn run(&self, program: &str, peer_port: u32, arguments: &str) -> PairSaid {
        let port = self.control_port;
        let command = |mode: &str, peer_cid: u32| {
            format!(
                "{program} --mode={mode} --control-port={port} --peer-cid={peer_cid} --peer-port={peer_port} {arguments}"
            )
        };
        let (server_output, client_output) = serve_and_connect(
            self.server.agent,
            &command("server", self.client.cid),
            self.client.agent,
            &format!(
                "{} --control-host={}",
                command("client", self.server.cid),
                self.control_host
            ),
            port,
            self.limit,
        );
        let mut said = PairSaid::default();
        let mut read = |name: &str, output: Result<Ended>| match output {
            Ok(ended) => {
                let tests = parse_output(&ended.output);
                if tests.is_empty() {
                    let (status, output) = (ended.status, ended.output.trim());
                    said.trouble.push_str(&format!(
                        "\n{name}: {program} ended with status {status}: {output}"
                    ));
                }
                Some(tests)
            }
            Err(error) => {
                said.trouble.push_str(&format!("\n{name}: {error:#}"));
                said.lost = true;
                None
            }
        };
        let server_said = read(self.server.name, server_output);
        let client_said = read(self.client.name, client_output);
        // The sides wait for each other before each test: whoever began one has seen the other end the one before.
        let before_the_last = |sayings: &Sayings| {
            let last = sayings.keys().next_back().copied();
            let ended = sayings.iter().filter(|(id, _)| Some(**id) != last);
            ended
                .map(|(id, said)| (*id, said.clone()))
                .collect::<Sayings>()
        };
        said.client = match (&client_said, &server_said) {
            (None, Some(server)) => before_the_last(server),
            _ => client_said.clone().unwrap_or_default(),
        };
        said.server = match (server_said, &client_said) {
            (None, Some(client)) => before_the_last(client),
            (server, _) => server.unwrap_or_default(),
        };
        said
    }
}

/// Runs a server on one side and, once it listens on the TCP port, a client on the other.
fn serve_and_connect(
    server: &Agent,
    server_command: &str,
    client: &Agent,
    client_command: &str,
    port: u32,
    limit: Duration,
) -> (Result<Ended>, Result<Ended>) {
    let answer_limit = limit + ANSWER_LIMIT;
    let limit = limit.as_secs();
    let serve = format!(
        "rm -f /tmp/server.*
        (timeout -s KILL {limit} {server_command} >/tmp/server.output 2>&1; echo $? >/tmp/server.status) \
            </dev/null >/dev/null 2>&1 &
        until grep -q ':{port:04X} 00000000:0000 0A' /proc/net/tcp; do
            [ ! -e /tmp/server.status ] || {{ cat /tmp/server.output; exit 1; }}
            sleep 0.1
        done"
    );
    if let Err(error) = sh_ok(server, &serve, answer_limit) {
        let nothing = Ended {
            status: 0,
            output: String::new(),
        };
        return (
            Err(error.context("the server does not listen")),
            Ok(nothing),
        );
    }
    let client_ended = sh(
        client,
        &format!("timeout -s KILL {limit} {client_command}"),
        answer_limit,
    );
    let server_ended = sh(
        server,
        "until [ -e /tmp/server.status ]; do sleep 0.1; done
        cat /tmp/server.output
        exit $(cat /tmp/server.status)",
        answer_limit,
    );
    (server_ended, client_ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        "ID\tTest name\n0\tSOCK_STREAM connection reset\n1\tSOCK_STREAM poll() + SO_RCVLOWAT\n";

    #[test]
    fn a_list_gives_numbers_and_names() -> Result<()> {
        let tests = parse_list(LIST)?;
        assert_eq!(tests.len(), 2);
        assert_eq!(tests[1].id, 1);
        assert_eq!(
            tests[1].full_name(Role::GuestClient),
            "host_tier::guest_client::sock_stream_poll_so_rcvlowat"
        );
        Ok(())
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
        assert_eq!(said[&29], Said::Skipped);
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
        let (host, guest) = (("host", &host), ("guest", &guest));
        assert_eq!(verdict(0, host, guest), Verdict::Ok);
        assert_eq!(
            verdict(1, host, guest),
            Verdict::Failed(
                "host: ok\nguest: did not finish it: read: Connection reset by peer".into()
            )
        );
        assert_eq!(
            verdict(2, host, guest),
            Verdict::Failed("host: skipped it\nguest: skipped it".into())
        );
        assert_eq!(verdict(3, host, guest), Verdict::NotBegun);
        assert_eq!(verdict(4, host, guest), Verdict::NotBegun);
    }
}
