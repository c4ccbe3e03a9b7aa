// SPDX-License-Identifier: GPL-2.0

//! The main job, shown: a guest on the stock kernel with this driver, step by step.

use anyhow::Result;
use crate::machine::Env;

pub fn run(_env: &Env) -> Result<bool> {
    Ok(false)
}
