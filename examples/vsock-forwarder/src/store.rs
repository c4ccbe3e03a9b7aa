// SPDX-License-Identifier: GPL-2.0

//! What a collector has stored: a folder for each stream, in it
//!
//! | file | has |
//! | --- | --- |
//! | `BOOT.data` | the stream of one boot of the guest |
//! | `BOOT.stored` | how many of its bytes are safe: what comes behind them is from before a crash, and is written anew |
//! | `last-boot` | which boot was the last |

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{ensure, Context, Result};
use rustix::fs::{flock, FlockOperation};

use crate::lock;

/// The longest name of a stream or a boot.
const MAX_NAME: usize = 64;

pub struct Store {
    folder: PathBuf,
    /// Those that connections have open, by the paths of their files without the ending.
    open: Mutex<HashMap<PathBuf, Arc<Mutex<Stored>>>>,
    /// Is locked as long as this program uses the folder.
    _lock: File,
}

/// The stream of one boot.
pub struct Stored {
    data: File,
    record: File,
    /// How much was written, in bytes.
    written: u64,
    /// How much of it is safe on the disk, in bytes.
    safe: u64,
}

impl Store {
    /// Opens the store in a folder, which is made where there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        let open = || -> Result<_> {
            fs::create_dir_all(folder)?;
            let lock = open_file(&folder.join("lock"))?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)
                .context("another collector uses it")?;
            Ok(lock)
        };
        Ok(Self {
            folder: folder.to_owned(),
            open: Mutex::default(),
            _lock: open().with_context(|| format!("the store {}", folder.display()))?,
        })
    }

    /// The stream of a boot, and which boot was the stream's last one until now.
    pub fn stream(&self, stream: &str, boot: &str) -> Result<(Arc<Mutex<Stored>>, Option<String>)> {
        check_name("stream", stream)?;
        check_name("boot", boot)?;
        let mut open = lock(&self.open);
        open.retain(|_, stored| Arc::strong_count(stored) > 1);
        let folder = self.folder.join(stream);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join(boot);
        let stored = match open.get(&path) {
            Some(stored) => stored.clone(),
            None => {
                let stored = Stored::open(&path)
                    .with_context(|| format!("opening what is stored in {}", path.display()))?;
                let stored = Arc::new(Mutex::new(stored));
                open.insert(path, stored.clone());
                stored
            }
        };
        let last_boot = folder.join("last-boot");
        let before = fs::read_to_string(&last_boot).ok();
        if before.as_deref() != Some(boot) {
            replace(&last_boot, boot)
                .with_context(|| format!("writing {}", last_boot.display()))?;
        }
        Ok((stored, before))
    }
}

impl Stored {
    fn open(path: &Path) -> Result<Self> {
        let data = open_file(&path.with_extension("data"))?;
        let record_path = path.with_extension("stored");
        let text = fs::read_to_string(&record_path).unwrap_or_default();
        let safe = match text.trim_end() {
            "" => 0,
            number => number
                .parse()
                .with_context(|| format!("{} says {number:?}", record_path.display()))?,
        };
        let len = data.metadata()?.len();
        ensure!(
            len >= safe,
            "the data has {len} bytes, and {safe} were acknowledged"
        );
        data.set_len(safe)?;
        let record = open_file(&record_path)?;
        // The files are there after a crash as well.
        sync_folder_of(path)?;
        Ok(Self {
            data,
            record,
            written: safe,
            safe,
        })
    }

    /// Writes what stands at an offset of the stream, but for what is there already.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        ensure!(
            offset <= self.written,
            "bytes from {offset} on, and those from {} on are missing",
            self.written
        );
        let known = (self.written - offset).min(bytes.len() as u64);
        let new = &bytes[known as usize..];
        self.data
            .write_all_at(new, self.written)
            .context("writing to the store")?;
        self.written += new.len() as u64;
        Ok(())
    }

    /// How much is not safe on the disk yet, in bytes.
    pub fn unsafe_bytes(&self) -> u64 {
        self.written - self.safe
    }

    /// Sees to it that all is safe on the disk; returns how much there is, in bytes.
    pub fn sync(&mut self) -> Result<u64> {
        if self.safe < self.written {
            self.data.sync_data().context("syncing the store")?;
            // Always as long, and shorter than a sector: it is written as a whole or not at all.
            let text = format!("{:020}\n", self.written);
            self.record
                .write_all_at(text.as_bytes(), 0)
                .context("noting what is stored")?;
            self.record.sync_data().context("noting what is stored")?;
            self.safe = self.written;
        }
        Ok(self.safe)
    }
}

fn open_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}

/// Gives a file another content, or leaves it as it is.
fn replace(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_folder_of(path)
}

fn sync_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().context("it is in no folder")?;
    Ok(File::open(folder)?.sync_all()?)
}

/// Names come from guests and become names of files.
fn check_name(what: &str, name: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    ensure!(
        (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed),
        "{name:?} is no name of a {what}: 1 to {MAX_NAME} letters, digits, - and _"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "d2c1a6a2-0001";

    fn stored(store: &Store) -> Arc<Mutex<Stored>> {
        store.stream("journal", BOOT).unwrap().0
    }

    #[test]
    fn what_comes_twice_is_stored_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let stored = stored(&store);
        let mut stored = lock(&stored);
        for (offset, bytes) in [
            (0, &b"abc"[..]),
            (0, b"abc"),
            (1, b"bcde"),
            (5, b""),
            (2, b"c"),
        ] {
            stored.write(offset, bytes).unwrap();
        }
        assert!(stored.write(6, b"g").is_err());
        assert_eq!(stored.sync().unwrap(), 5);
        let path = folder
            .path()
            .join("journal")
            .join(BOOT)
            .with_extension("data");
        assert_eq!(fs::read(path).unwrap(), b"abcde");
    }

    #[test]
    fn what_was_not_acknowledged_before_a_crash_is_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        {
            let stored = stored(&store);
            let mut stored = lock(&stored);
            stored.write(0, b"safe").unwrap();
            stored.sync().unwrap();
            stored.write(4, b"not safe").unwrap();
        }
        drop(store);
        let store = Store::open(folder.path()).unwrap();
        let stored = stored(&store);
        let mut stored = lock(&stored);
        assert_eq!(stored.sync().unwrap(), 4);
        stored.write(4, b" again").unwrap();
        let path = folder
            .path()
            .join("journal")
            .join(BOOT)
            .with_extension("data");
        assert_eq!(fs::read(path).unwrap(), b"safe again");
    }

    #[test]
    fn last_boot_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        for (boot, before) in [
            ("a", None),
            ("a", Some("a")),
            ("b", Some("a")),
            ("c", Some("b")),
        ] {
            let (_, said) = store.stream("journal", boot).unwrap();
            assert_eq!(said.as_deref(), before);
        }
    }

    #[test]
    fn one_collector_at_a_time_and_no_strange_names() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert!(Store::open(folder.path()).is_err());
        for name in [
            "",
            ".",
            "..",
            "../etc",
            "a/b",
            "a b",
            "a.data",
            &"x".repeat(65),
        ] {
            assert!(store.stream(name, "a").is_err(), "{name:?}");
            assert!(store.stream("journal", name).is_err(), "{name:?}");
        }
    }
}
