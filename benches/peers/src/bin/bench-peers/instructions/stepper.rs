//! Counts a thread's user instructions without hardware counters, by stepping through them one by one (ptrace).
//!
//! All other threads of the process stand still meanwhile, so that no watchdog takes the slow thread for a stalled one.
//! What the kernel does is not counted but named: how often which system call is made.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::libc::{SYS_clock_gettime, user_regs_struct};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::clock::{Call, Clock};
use super::load::Gauge;
use super::symbols;

/// `syscall`, in machine code.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// What was counted in the rounds.
#[derive(Debug, Clone, Default)]
pub struct Counted {
    /// Instructions of each round.
    pub rounds: Vec<u64>,
    pub requests: u64,
    /// System calls by number.
    pub calls: BTreeMap<u64, u64>,
    /// Instructions by address; those of libraries at the place in the program that called for them.
    pub addresses: HashMap<Place, u64>,
}

/// Where an instruction is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    Program(u64),
    /// In a library, on behalf of this place of the program: libraries are mostly stripped, and who copies and allocates
    /// is the question.
    LibraryFor(u64),
}

/// A process whose threads stand still. Dropping it lets them go.
#[derive(Debug)]
pub struct Stepper {
    /// The one that is stepped.
    thread: Pid,
    others: Vec<Pid>,
    clock: Clock,
    memory: fs::File,
    /// Whether the instruction at an address is a system call.
    sites: HashMap<u64, bool>,
    /// Where the program's own code is.
    program: Range<u64>,
    /// Where the thread is.
    at: u64,
    /// Where it comes back to from a library.
    back_in_program: u64,
    /// Where it comes back to from the clock.
    back_from_clock: Option<u64>,
    /// A signal that the thread is to get with its next step.
    signal: Option<Signal>,
}

impl Stepper {
    /// Stops all threads of a process.
    pub fn stop(process: u32, thread: i32) -> Result<Self, String> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            format!("{what} process {process}: {error} (see kernel.yama.ptrace_scope; containers may forbid ptrace)")
        };
        let memory = || fs::File::options().read(true).write(true).open(format!("/proc/{process}/mem"));
        let maps = fs::read_to_string(format!("/proc/{process}/maps"));
        let maps = maps.map_err(|error| failed("read the mappings of", &error))?;
        let clock = Clock::find(memory().map_err(|error| failed("open the memory of", &error))?, &maps)?;
        let program =
            fs::read_link(format!("/proc/{process}/exe")).map_err(|error| failed("find the program of", &error))?;
        let program = symbols::code(&maps, &program.display().to_string());
        let tasks = fs::read_dir(format!("/proc/{process}/task")).map_err(|error| failed("list threads of", &error))?;
        let tasks = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
        let mut stepper = Self {
            thread: Pid::from_raw(thread),
            others: Vec::new(),
            clock,
            memory: memory().map_err(|error| failed("open the memory of", &error))?,
            sites: HashMap::new(),
            program: program.ok_or("the process does not show its program")?,
            at: 0,
            back_in_program: 0,
            back_from_clock: None,
            signal: None,
        };
        for task in tasks.map(Pid::from_raw).filter(|task| task.as_raw() != thread) {
            halt(task).map_err(|error| failed("stop a thread of", &error))?;
            stepper.others.push(task);
        }
        halt(stepper.thread).map_err(|error| failed("stop a thread of", &error))?;
        stepper.at = stepper.registers()?.rip;
        Ok(stepper)
    }

    /// Steps until so many rounds of answers have been counted, after some that are not.
    pub fn count(&mut self, gauge: &Gauge, per_round: u64, rounds: usize, skipped: usize) -> Result<Counted, String> {
        let mut counted = Counted::default();
        let mut instructions = 0;
        let (mut round_began, mut answers) = (0, gauge.answers.load(Ordering::SeqCst));
        let (mut seen, first) = (0, answers);
        while counted.rounds.len() < rounds {
            let now = gauge.answers.load(Ordering::Relaxed);
            if now - first >= per_round * (seen + 1) {
                seen = (now - first) / per_round;
                if seen as usize == skipped {
                    counted = Counted::default();
                    answers = now;
                } else if seen as usize > skipped {
                    counted.rounds.push(instructions - round_began);
                    counted.requests = now - answers;
                }
                round_began = instructions;
            }
            let from = self.at;
            let call = self.call_at(from)?;
            self.step()?;
            // An instruction with a repeat prefix is stepped once for each repetition; counters count it once.
            if self.at != from {
                instructions += 1;
                *counted.addresses.entry(self.place(from)?).or_default() += 1;
            }
            if let Some(number) = call {
                *counted.calls.entry(number).or_default() += 1;
            }
            self.set_clock(instructions)?;
        }
        Ok(counted)
    }

    /// Where the instruction counts that the thread has just left.
    fn place(&mut self, from: u64) -> Result<Place, String> {
        if !self.program.contains(&from) {
            return Ok(Place::LibraryFor(self.back_in_program));
        }
        if !self.program.contains(&self.at) {
            let mut bytes = [0; 8];
            let stack = self.registers()?.rsp;
            let read = self.memory.read_exact_at(&mut bytes, stack);
            read.map_err(|error| format!("read a thread's stack: {error}"))?;
            self.back_in_program = u64::from_ne_bytes(bytes);
        }
        Ok(Place::Program(from))
    }

    /// The number of the system call that is at an address, if there is one.
    fn call_at(&mut self, address: u64) -> Result<Option<u64>, String> {
        let is_call = match self.sites.get(&address) {
            Some(is_call) => *is_call,
            None => {
                let mut bytes = [0; 2];
                // What cannot be read is no code of a file: the stop tells what it is.
                let is_call = self.memory.read_exact_at(&mut bytes, address).is_ok() && bytes == SYSCALL;
                self.sites.insert(address, is_call);
                is_call
            }
        };
        if is_call { self.registers().map(|registers| Some(registers.rax)) } else { Ok(None) }
    }

    /// One instruction.
    fn step(&mut self) -> Result<(), String> {
        let failed = |error: Errno| format!("step a thread: {error}");
        ptrace::step(self.thread, self.signal.take()).map_err(failed)?;
        loop {
            match waitpid(self.thread, Some(WaitPidFlag::__WALL)).map_err(failed)? {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => break,
                WaitStatus::Stopped(_, signal) => {
                    // The thread gets it with its next step, in which the handler begins.
                    self.signal = Some(signal);
                    break;
                }
                WaitStatus::PtraceEvent(..) => ptrace::step(self.thread, None).map_err(failed)?,
                ended => return Err(format!("the stepped thread has ended: {ended:?}")),
            }
        }
        self.at = self.instruction_pointer()?;
        Ok(())
    }

    fn set_clock(&mut self, instructions: u64) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("set a thread's clock: {error}");
        if self.at == self.clock.entry {
            let user_regs_struct { rdi, rsi, rsp, .. } = self.registers()?;
            let call = Call { clock: rdi, time_at: rsi, stack: rsp };
            self.back_from_clock = Some(self.clock.called(call).map_err(failed)?);
        } else if self.back_from_clock == Some(self.at) {
            let stack = self.registers()?.rsp;
            self.clock.returned(stack, instructions).map_err(failed)?;
        }
        Ok(())
    }

    fn registers(&self) -> Result<user_regs_struct, String> {
        ptrace::getregs(self.thread).map_err(|error| format!("read a thread's registers: {error}"))
    }

    fn instruction_pointer(&self) -> Result<u64, String> {
        let offset = std::mem::offset_of!(user_regs_struct, rip);
        let read = ptrace::read_user(self.thread, offset as ptrace::AddressType);
        read.map(|word| word as u64).map_err(|error| format!("read a thread's registers: {error}"))
    }
}

impl Drop for Stepper {
    fn drop(&mut self) {
        // One that has ended is gone already.
        for thread in self.others.iter().chain([&self.thread]) {
            let _ = ptrace::detach(*thread, None);
        }
    }
}

/// Stops one thread.
fn halt(thread: Pid) -> nix::Result<()> {
    ptrace::seize(thread, ptrace::Options::empty())?;
    ptrace::interrupt(thread)?;
    waitpid(thread, Some(WaitPidFlag::__WALL)).map(drop)
}

/// A system call's name, for those that servers make.
pub fn call_name(number: u64) -> String {
    use nix::libc;
    let names: [(i64, &str); 16] = [
        (libc::SYS_read, "read"),
        (libc::SYS_write, "write"),
        (libc::SYS_readv, "readv"),
        (libc::SYS_writev, "writev"),
        (libc::SYS_sendto, "sendto"),
        (libc::SYS_recvfrom, "recvfrom"),
        (libc::SYS_sendmsg, "sendmsg"),
        (libc::SYS_recvmsg, "recvmsg"),
        (libc::SYS_epoll_wait, "epoll_wait"),
        (libc::SYS_epoll_pwait, "epoll_pwait"),
        (libc::SYS_epoll_pwait2, "epoll_pwait2"),
        (libc::SYS_epoll_ctl, "epoll_ctl"),
        (libc::SYS_io_uring_enter, "io_uring_enter"),
        (libc::SYS_futex, "futex"),
        (libc::SYS_ppoll, "ppoll"),
        (SYS_clock_gettime, "clock_gettime"),
    ];
    let found = names.iter().find(|(known, _)| *known as u64 == number);
    found.map_or_else(|| format!("call {number}"), |(_, name)| (*name).to_owned())
}
