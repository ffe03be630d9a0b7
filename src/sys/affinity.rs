//! Which CPUs this process may use and how much of them: affinity, cpusets and cgroup quotas.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The CPUs at hand when asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Cpus {
    /// Numbers of the CPUs the calling thread may run on (affinity and cpusets), ascending.
    pub allowed: Vec<usize>,
    /// CPU time the cgroup grants, in CPUs (1.5 = 150 ms of every 100 ms); `None` if unlimited.
    pub quota: Option<f64>,
}

impl Cpus {
    /// How many executors make sense: one for each CPU, no more than the quota can keep busy.
    pub fn executors(&self) -> usize {
        let allowed = self.allowed.len().max(1);
        match self.quota {
            // The conversion saturates, and a quota is positive.
            Some(quota) => allowed.min((quota.ceil() as usize).max(1)),
            None => allowed,
        }
    }
}

/// What the calling thread may use. Ask before threads are pinned: a pinned thread sees one CPU.
pub fn available() -> Cpus {
    let allowed = match core_affinity::get_core_ids() {
        Some(cores) if !cores.is_empty() => cores.into_iter().map(|core| core.id).collect(),
        // Its mask has room for 1,024 CPUs; with more the call fails, while /proc has no limit.
        _ => allowed_by_proc().unwrap_or_else(|| vec![0]),
    };
    let quota = quota_from(Path::new("/proc/self")).or_else(|| {
        // num_cpus reads the quota of our own group only and rounds it, but may know the way to it
        // where we do not.
        let count = num_cpus::get();
        (count < allowed.len()).then_some(count as f64)
    });
    Cpus { allowed, quota }
}

/// Lets the calling thread run on these CPUs, as far as they exist and its cpuset has them.
///
/// # Errors
/// When it has none of them.
pub fn run_on(cpus: &[usize]) -> io::Result<()> {
    const BITS: usize = u64::BITS as usize;
    let words = cpus.iter().max().map_or(1, |last| last / BITS + 1);
    let mut mask = vec![0_u64; words];
    for cpu in cpus {
        mask[cpu / BITS] |= 1 << (cpu % BITS);
    }
    // SAFETY: `mask` is a CPU mask of that many bytes, which the call reads; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, words * (BITS / 8), mask.as_ptr().cast()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The CPU the calling thread is running on at this moment.
pub fn current_cpu() -> usize {
    // SAFETY: takes no memory.
    let cpu = unsafe { libc::sched_getcpu() };
    // It fails only on kernels without getcpu, where nothing else of ours runs either.
    usize::try_from(cpu).unwrap_or(0)
}

/// A tenth of the share of a thread that has not stepped back. Not the least there is: a thread that is kept from the CPU
/// keeps the locks it has, the allocator's and the log's among them, from executors that run into them. At 19 it would be
/// a sixty-eighth, 200 ms until its next slice beside one busy thread, and minutes beside what has a higher priority.
const BACK: libc::c_int = 10;

/// Gives the calling thread a low priority: it hardly runs while others of the process want the CPU.
pub fn step_back() {
    // SAFETY: takes no memory. Zero is the calling thread; lowering one's own priority is always allowed.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, BACK) };
}

/// Reads the kernel's notation for a set of CPUs: `0-3,7`. Ascending, each once.
///
/// An empty list, a reversed range and a number from [`CPUS_MAX`] on are errors.
pub fn parse_cpu_list(text: &str) -> Result<Vec<usize>, String> {
    let number = |part: &str| match part.trim().parse::<usize>() {
        Ok(cpu) if cpu < CPUS_MAX => Ok(cpu),
        Ok(cpu) => Err(format!("CPU {cpu} in '{text}' is beyond the largest possible, {}", CPUS_MAX - 1)),
        Err(_) => Err(format!("'{part}' in the CPU list '{text}' is not a number; write it like 0-3,7")),
    };
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(format!("the range '{part}' in the CPU list '{text}' runs backwards; write {last}-{first}"));
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// More CPUs than any Linux is built for (`CONFIG_NR_CPUS` ends at 8,192).
const CPUS_MAX: usize = 8192;

fn allowed_by_proc() -> Option<Vec<usize>> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    parse_cpu_list(list.trim()).ok()
}

/// The tightest quota from the process's cgroup up to the root of what is mounted, in CPUs.
///
/// Each group on the way limits all below it, so all are read (num_cpus reads the lowest only).
fn quota_from(proc_self: &Path) -> Option<f64> {
    let groups = fs::read_to_string(proc_self.join("cgroup")).ok()?;
    let mounts = fs::read_to_string(proc_self.join("mountinfo")).ok()?;
    Hierarchy::of_process(&groups, &mounts).into_iter().filter_map(|hierarchy| hierarchy.quota()).reduce(f64::min)
}

/// Where the process stands in one mounted cgroup tree that can limit CPU time.
#[derive(Debug, PartialEq)]
struct Hierarchy {
    unified: bool,
    mount_point: PathBuf,
    group: PathBuf,
}

impl Hierarchy {
    /// From the texts of /proc/self/cgroup and /proc/self/mountinfo: version 1, 2, or both.
    fn of_process(groups: &str, mounts: &str) -> Vec<Self> {
        let mut found = Vec::new();
        for line in groups.lines() {
            // "0::/path" is version 2, "4:cpu,cpuacct:/path" one of version 1.
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
                continue;
            };
            let unified = controllers.is_empty();
            if unified || controllers.split(',').any(|name| name == "cpu") {
                let mount = mounts.lines().find_map(|line| Self::mount(line, unified));
                if let Some((root, mount_point)) = mount {
                    // In a container the path may lie outside of what is mounted; then what is
                    // mounted is the container's own group.
                    let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
                    found.push(Self { unified, group: mount_point.join(below), mount_point });
                }
            }
        }
        found
    }

    /// Root and mount point, if a line of mountinfo is a cgroup tree of that kind.
    fn mount(line: &str, unified: bool) -> Option<(&Path, PathBuf)> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, mount_point) = (mount.next()?, mount.next()?);
        let mut filesystem = filesystem.split(' ');
        let kind = filesystem.next()?;
        let options = filesystem.nth(1).unwrap_or_default();
        let wanted = match unified {
            true => kind == "cgroup2",
            false => kind == "cgroup" && options.split(',').any(|option| option == "cpu"),
        };
        wanted.then(|| (Path::new(root), PathBuf::from(mount_point)))
    }

    fn quota(&self) -> Option<f64> {
        self.group
            .ancestors()
            .take_while(|group| group.starts_with(&self.mount_point))
            .filter_map(|group| self.quota_of(group))
            .reduce(f64::min)
    }

    fn quota_of(&self, group: &Path) -> Option<f64> {
        let read = |name| fs::read_to_string(group.join(name)).ok();
        let text = match self.unified {
            true => read("cpu.max")?,
            false => read("cpu.cfs_quota_us")? + " " + &read("cpu.cfs_period_us")?,
        };
        parse_quota(&text)
    }
}

/// "quota period" in microseconds, in CPUs. `None` for "max" and -1, which mean unlimited.
fn parse_quota(text: &str) -> Option<f64> {
    let mut numbers = text.split_whitespace().map(str::parse::<f64>);
    let (quota, period) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    (quota > 0.0 && period > 0.0).then_some(quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cpu_list("0"), Ok(vec![0]));
        assert_eq!(parse_cpu_list("0-3,7"), Ok(vec![0, 1, 2, 3, 7]));
        assert_eq!(parse_cpu_list("7, 2-3 ,3-4"), Ok(vec![2, 3, 4, 7]));
        assert_eq!(parse_cpu_list("5-5"), Ok(vec![5]));
    }

    #[test]
    fn bad_cpu_lists_are_refused_with_the_place_named() {
        for (text, part) in [
            ("", "''"),
            ("0,", "''"),
            ("a", "'a'"),
            ("1-", "''"),
            ("-1", "''"),
            ("1-2-3", "'2-3'"),
            ("3-1", "'3-1'"),
            ("0-99999999999", "99999999999"),
            ("99999999999999999999999", "'99999999999999999999999'"),
        ] {
            let error = parse_cpu_list(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn executors_follow_cpus_and_quota() {
        let executors = |cpus: usize, quota| Cpus { allowed: (0..cpus).collect(), quota }.executors();
        assert_eq!(executors(8, None), 8);
        assert_eq!(executors(8, Some(2.5)), 3);
        assert_eq!(executors(8, Some(0.1)), 1);
        assert_eq!(executors(2, Some(64.0)), 2);
        assert_eq!(executors(0, None), 1);
    }

    #[test]
    fn quotas_are_read_and_unlimited_is_none() {
        assert_eq!(parse_quota("150000 100000\n"), Some(1.5));
        assert_eq!(parse_quota("max 100000\n"), None);
        assert_eq!(parse_quota("-1\n 100000\n"), None);
        assert_eq!(parse_quota("1000 0"), None);
        assert_eq!(parse_quota(""), None);
    }

    #[test]
    fn the_tightest_quota_on_the_way_up_applies() {
        let root = std::env::temp_dir().join(format!("ringleader-cgroup-{}", std::process::id()));
        let group = root.join("fs/slice/unit");
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("cpu.max"), "max 100000\n").unwrap();
        fs::write(root.join("fs/slice/cpu.max"), "250000 100000\n").unwrap();
        fs::write(root.join("cgroup"), "0::/slice/unit\n").unwrap();
        let mount =
            format!("30 23 0:26 / {} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n", root.join("fs").display());
        fs::write(root.join("mountinfo"), mount).unwrap();
        assert_eq!(quota_from(&root), Some(2.5));
        fs::write(group.join("cpu.max"), "50000 100000\n").unwrap();
        assert_eq!(quota_from(&root), Some(0.5));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(quota_from(&root), None);
    }

    #[test]
    fn both_versions_and_containers_are_found_in_the_mounts() {
        let mounts = "\
30 23 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
31 23 0:27 /docker/abc /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let groups = "5:memory:/\n4:cpu,cpuacct:/docker/abc/inner\n0::/../other\nnonsense\n";
        let found = Hierarchy::of_process(groups, mounts);
        assert_eq!(found.len(), 2);
        assert!(!found[0].unified);
        assert_eq!(found[0].group, Path::new("/sys/fs/cgroup/cpu,cpuacct/inner"));
        assert!(found[1].unified);
        assert_eq!(found[1].mount_point, Path::new("/sys/fs/cgroup/unified"));
    }

    #[test]
    fn a_pinned_thread_can_be_let_go_again() {
        let thread = std::thread::spawn(|| {
            let all = available().allowed;
            run_on(&all[..1]).expect("it may run there");
            assert_eq!(available().allowed, all[..1]);
            run_on(&all).expect("it may run there");
            assert_eq!(available().allowed, all);
            run_on(&[CPUS_MAX - 1]).expect_err("there is no such CPU");
            assert_eq!(available().allowed, all);
        });
        thread.join().expect("no assertion fails");
    }

    #[test]
    fn this_machine_has_cpus_and_we_run_on_one_of_them() {
        let cpus = available();
        assert!(!cpus.allowed.is_empty());
        assert!(cpus.allowed.contains(&current_cpu()));
        assert!((1..=cpus.allowed.len()).contains(&cpus.executors()));
        assert_eq!(allowed_by_proc(), Some(cpus.allowed));
    }
}
