// SPDX-License-Identifier: GPL-2.0

//! What is forwarded: a file that grows, or standard input.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};

/// How often a file is looked at whether it has grown.
const INTERVAL: Duration = Duration::from_millis(100);

pub enum Source {
    File { path: PathBuf, file: File },
    Stdin,
}

impl Source {
    /// A file, or standard input for `-`.
    pub fn open(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdin);
        }
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self::File {
            path: path.to_owned(),
            file,
        })
    }

    /// Leaves out what the collector has: so many bytes at the beginning.
    pub fn skip(&mut self, len: u64) -> Result<()> {
        match self {
            Self::File { path, file } => {
                let has = file.metadata().context("looking at the source")?.len();
                let path = path.display();
                ensure!(
                    has >= len,
                    "{path} has {has} bytes, and the collector has {len} of it from this boot: it was replaced"
                );
                file.seek(SeekFrom::Start(len))?;
            }
            Self::Stdin => {
                let has = io::copy(&mut io::stdin().lock().take(len), &mut io::sink())?;
                ensure!(
                    has == len,
                    "standard input ends after {has} bytes, and the collector has {len} of it from this boot"
                );
            }
        }
        Ok(())
    }

    /// Waits for more; 0 at the end of standard input, a file has none.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let (path, file) = match self {
            Self::File { path, file } => (path, file),
            Self::Stdin => return io::stdin().read(buffer).context("reading standard input"),
        };
        loop {
            let len = file
                .read(buffer)
                .with_context(|| format!("reading {}", path.display()))?;
            if len > 0 {
                return Ok(len);
            }
            let metadata = file.metadata()?;
            if metadata.len() < file.stream_position()? {
                bail!("{} has become shorter", path.display());
            }
            // Without a file of that name one may be about to come.
            if let Ok(now) = path.metadata() {
                if (now.dev(), now.ino()) != (metadata.dev(), metadata.ino()) {
                    bail!("{} was replaced", path.display());
                }
            }
            sleep(INTERVAL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_replaced_file_is_read_to_its_end_and_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let [path, old] = ["log", "log.1"].map(|name| folder.path().join(name));
        fs::write(&path, "before").unwrap();
        let mut source = Source::open(&path).unwrap();
        fs::rename(&path, &old).unwrap();
        fs::write(&path, "as long").unwrap();
        let mut buffer = [0; 9];
        assert_eq!(source.read(&mut buffer).unwrap(), 6);
        let error = source.read(&mut buffer).unwrap_err().to_string();
        assert!(error.ends_with("log was replaced"), "{error}");
    }

    #[test]
    fn a_file_that_becomes_shorter_is_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "before").unwrap();
        let mut source = Source::open(&path).unwrap();
        source.skip(6).unwrap();
        fs::write(&path, "now").unwrap();
        let error = source.read(&mut [0; 9]).unwrap_err().to_string();
        assert!(error.ends_with("log has become shorter"), "{error}");
    }
}
