//! The clock of a stepped thread. A stepped thread runs a thousand times slower than usual, so by the true time it would
//! do what it does every so many milliseconds (timers, the date, polls of a second reactor) for each request. So when it
//! asks for the time in the kernel's shared page (vDSO), the answer is replaced by one that follows its instructions.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use object::{Object, ObjectSymbol};

/// How far the clock goes per instruction. A hello takes some 5,000 user instructions and, with its share of the kernel,
/// about 10 µs.
pub const NS_PER_INSTRUCTION: u64 = 2;

/// Clocks that move with the kernel's tick, `CLOCK_REALTIME_COARSE` and `CLOCK_MONOTONIC_COARSE`, and how far: as with a
/// `CONFIG_HZ` of 250. Who asks one whether it has moved is not to be told so each time.
const COARSE: [u64; 2] = [5, 6];
const TICK: u64 = 4_000_000;

/// The function through which programs ask.
const FUNCTION: &str = "__vdso_clock_gettime";

/// Registers at a call: arguments one and two, and the stack pointer.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub clock: u64,
    pub time_at: u64,
    pub stack: u64,
}

/// One thread's clock, by its instructions.
#[derive(Debug)]
pub struct Clock {
    /// Address of the function in the thread's process.
    pub entry: u64,
    memory: fs::File,
    call: Option<(Call, u64)>,
    /// For each clock what it said first, and at which instruction, in nanoseconds.
    began: HashMap<u64, (u64, u64)>,
}

impl Clock {
    /// Finds the function in the process's vDSO. `memory` is its `/proc/PID/mem`.
    pub fn find(memory: fs::File, maps: &str) -> Result<Self, String> {
        let range = mapping(maps, "[vdso]").ok_or("the process has no vDSO")?;
        let mut image = vec![0; (range.end - range.start) as usize];
        memory.read_exact_at(&mut image, range.start).map_err(|error| format!("read the vDSO: {error}"))?;
        let file = object::File::parse(&*image).map_err(|error| format!("read the vDSO: {error}"))?;
        let symbol = file.dynamic_symbols().find(|symbol| symbol.name() == Ok(FUNCTION));
        let address = symbol.ok_or_else(|| format!("the vDSO has no {FUNCTION}"))?.address();
        Ok(Self { entry: range.start + address, memory, call: None, began: HashMap::new() })
    }

    /// The thread is at `entry`. Returns where it will come back to.
    pub fn called(&mut self, call: Call) -> io::Result<u64> {
        let back = self.word(call.stack)?;
        self.call = Some((call, back));
        Ok(back)
    }

    /// The thread has come back from the call after so many instructions: its answer is replaced.
    pub fn returned(&mut self, stack: u64, instructions: u64) -> io::Result<()> {
        let Some((call, _)) = self.call.take_if(|(call, _)| stack == call.stack + 8) else { return Ok(()) };
        let said = self.word(call.time_at)? * 1_000_000_000 + self.word(call.time_at + 8)?;
        let now = instructions * NS_PER_INSTRUCTION;
        let (first, then) = *self.began.entry(call.clock).or_insert((said, now));
        let exact = first + (now - then);
        let time = if COARSE.contains(&call.clock) { exact - exact % TICK } else { exact };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(time / 1_000_000_000).to_ne_bytes());
        bytes[8..].copy_from_slice(&(time % 1_000_000_000).to_ne_bytes());
        self.memory.write_all_at(&bytes, call.time_at)
    }

    fn word(&self, address: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, address)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

/// Where a mapping of this name begins and ends, by the text of `/proc/PID/maps`.
fn mapping(maps: &str, name: &str) -> Option<Range<u64>> {
    let line = maps.lines().find(|line| line.ends_with(name))?;
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_found_by_name() {
        let maps =
            "00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/x\n7ffc000-7ffe000 r-xp 00000000 00:00 0 [vdso]\n";
        assert_eq!(mapping(maps, "[vdso]"), Some(0x7ff_c000..0x7ff_e000));
        assert_eq!(mapping(maps, "[vsyscall]"), None);
    }
}
