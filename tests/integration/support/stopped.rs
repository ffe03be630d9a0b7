//! A thread that gets no CPU, for as long as a test wants.

/// A thread of another process that stands still for as long as this lives, while the others of that process go on.
pub struct Stopped(i32);

impl Stopped {
    pub fn thread(process: u32, name: &str) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("it lives").flatten();
        let is_it = |task: &std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
        };
        let task = { tasks }.find(is_it).unwrap_or_else(|| panic!("no thread {name}"));
        let id: i32 = task.file_name().to_string_lossy().parse().expect("threads have numbers");
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: takes no memory; attaches to a thread of our own child and stops it.
        let stopped = unsafe {
            libc::ptrace(libc::PTRACE_SEIZE, id, nothing, nothing) == 0
                && libc::ptrace(libc::PTRACE_INTERRUPT, id, nothing, nothing) == 0
        };
        assert!(stopped, "{}", std::io::Error::last_os_error());
        // SAFETY: without a place for the status it takes no memory.
        assert_eq!(unsafe { libc::waitpid(id, std::ptr::null_mut(), libc::__WALL) }, id);
        Self(id)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: takes no memory; lets go of a thread that this one has attached to.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, nothing, nothing) };
    }
}
