//! The command line every rival takes.

use std::net::SocketAddr;
use std::str::FromStr;

/// `--listen ADDR --executors N --cpus LIST`.
#[derive(Debug, Clone, clap::Parser)]
pub struct PeerOptions {
    /// Address and port to listen on.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Executors: pinned threads, each with its own runtime and listener.
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub executors: u16,
    /// CPUs to pin to, such as `0` or `0,2-3`; executor i takes the (i mod length)th.
    #[arg(long, default_value = "0")]
    pub cpus: CpuList,
    /// Add `/chaos/spin?ms=N`, as Ringleader's `--chaos` does; only peer-tokio has it.
    #[arg(long)]
    pub chaos: bool,
}

/// CPU numbers in the notation of taskset and cpusets. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

impl CpuList {
    /// The CPU of one executor; executors beyond the list start over.
    #[must_use]
    pub fn of_executor(&self, index: usize) -> usize {
        self.0[index % self.0.len()]
    }
}

/// Far above any machine; it keeps a typing error from becoming a list of billions.
const CPU_MAX: usize = 4095;

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (cpu(first)?, cpu(last)?);
            if last < first {
                return Err(format!("the range `{part}` runs backwards"));
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

fn cpu(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(number) if number <= CPU_MAX => Ok(number),
        _ => Err(format!("`{text}` is not a CPU number (0 to {CPU_MAX})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read_as_taskset_reads_them() {
        let list: CpuList = "0,2-4".parse().unwrap();
        assert_eq!(list, CpuList(vec![0, 2, 3, 4]));
        assert_eq!(list.of_executor(5), 2);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "a", "3-1", "0,,1", "0-99999999999"] {
            assert!(text.parse::<CpuList>().is_err(), "{text:?}");
        }
    }
}
