//! Tests of sampling: the sampled thread does what it did, whatever it was doing, and is told apart from one that has ended.

use std::io::{Read, Write};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;

use super::*;

/// A loaded machine may leave a thread without its CPU for a long time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Samples as often as it takes: a thread whose CPU is taken away in the middle of an answer keeps the desk of the whole
/// process until it has it back, and other tests' samplers with it.
pub(crate) fn sample_in_time(sampler: &Sampler, thread: &ThreadId) -> Result<StackSample, SampleError> {
    let begun = Instant::now();
    loop {
        match sampler.sample(thread, PATIENCE) {
            Err(SampleError::Busy | SampleError::NoAnswer { .. }) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

/// Runs `work` over and over in a thread while that is sampled `times` times; each round says whether its result is right.
/// Returns how many samples there were and how many rounds.
fn sample_while(times: usize, mut work: impl FnMut(u64) -> bool + Send + 'static) -> (Vec<StackSample>, u64) {
    let sampler = Sampler::install().unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let (send, receive) = mpsc::channel();
    let ended = Arc::clone(&end);
    let worker = std::thread::spawn(move || {
        send.send(ThreadId::current().unwrap()).unwrap();
        let mut rounds = 0;
        while !ended.load(Ordering::Relaxed) {
            assert!(work(rounds), "round {rounds} was disturbed");
            rounds += 1;
        }
        rounds
    });
    let thread = receive.recv().unwrap();
    let samples = (0..times).map(|_| sample_in_time(&sampler, &thread).unwrap()).collect();
    end.store(true, Ordering::Relaxed);
    (samples, worker.join().expect("no round was disturbed"))
}

#[test]
fn a_thread_that_computes_is_not_disturbed() {
    let (samples, rounds) = sample_while(10_000, |round| {
        // Floating point and flags live in registers that the handler must give back.
        let on_stack = std::hint::black_box([round; 16]);
        let sum: f64 = (0..100).map(|i| f64::from(i) * 0.5).sum();
        let mixed = (0..100_u64).fold(round, |mixed, i| mixed.rotate_left(7).wrapping_mul(31) ^ i);
        let again = (0..100_u64).fold(round, |mixed, i| mixed.rotate_left(7).wrapping_mul(31) ^ i);
        std::hint::black_box(&on_stack);
        sum == 2475.0 && mixed == again && on_stack == [round; 16]
    });
    assert!(rounds > 0);
    for sample in samples {
        assert_ne!(sample.registers.program_counter, 0);
        assert!(sample.word(sample.registers.stack_pointer & !7).is_some());
    }
}

#[test]
fn a_thread_that_allocates_can_be_sampled_at_any_instant() {
    let (_, rounds) = sample_while(10_000, |round| {
        let size = 1 + (round as usize * 7919) % 5000;
        let block = vec![round as u8; size];
        let moved: Vec<Vec<u8>> = (0..4).map(|_| block.clone()).collect();
        moved.iter().all(|copy| copy.len() == size && copy.iter().all(|byte| *byte == round as u8))
    });
    assert!(rounds > 0);
}

#[test]
fn a_thread_that_takes_locks_and_makes_system_calls_sees_no_errors() {
    let mutex = Mutex::new(0_u64);
    let mut file = std::fs::File::open("/proc/self/cmdline").unwrap();
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let (_, rounds) = sample_while(10_000, move |round| {
        *mutex.lock().unwrap() = round;
        let mut byte = [0];
        let read = writer.write_all(&[round as u8]).and_then(|()| reader.read_exact(&mut byte));
        let command = std::io::Seek::rewind(&mut file).and_then(|()| file.read(&mut [0; 16]));
        // `errno` is the handler's to keep: the close fails, and says so after the signal as before.
        // SAFETY: no descriptor has this number.
        let closed = unsafe { libc::close(-1) };
        let errno = io::Error::last_os_error().raw_os_error();
        read.is_ok() && byte[0] == round as u8 && command.is_ok() && closed == -1 && errno == Some(libc::EBADF)
    });
    assert!(rounds > 0);
}

#[test]
fn a_blocking_read_goes_on_after_the_signal() {
    let sampler = Sampler::install().unwrap();
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let (send, receive) = mpsc::channel();
    let worker = std::thread::spawn(move || {
        send.send(ThreadId::current().unwrap()).unwrap();
        let mut byte = [0];
        // The system call itself, without the loop around EINTR that the standard library has elsewhere.
        let read = reader.read(&mut byte);
        (read.map_err(|error| error.raw_os_error()), byte[0])
    });
    let thread = receive.recv().unwrap();
    for _ in 0..1_000 {
        sample_in_time(&sampler, &thread).unwrap();
    }
    writer.write_all(&[42]).unwrap();
    assert_eq!(worker.join().unwrap(), (Ok(1), 42));
}

#[test]
fn a_thread_that_has_ended_is_never_taken_for_another() {
    let sampler = Sampler::install().unwrap();
    let thread = std::thread::spawn(|| ThreadId::current().unwrap()).join().unwrap();
    assert!(matches!(sample_in_time(&sampler, &thread), Err(SampleError::Ended)));
}

#[test]
fn a_thread_can_sample_itself() {
    let sampler = Sampler::install().unwrap();
    let thread = ThreadId::current().unwrap();
    let sample = sample_in_time(&sampler, &thread).unwrap();
    assert!(sample.word(sample.registers.stack_pointer & !7).is_some());
    assert_eq!(sample.word(sample.registers.stack_pointer & !7 | 1), None);
    assert_eq!(sample.word(0), None);
}

#[test]
fn a_deep_stack_is_cut_off() {
    fn deep(levels: usize, sampler: &Sampler) -> StackSample {
        let room = std::hint::black_box([levels; 512]);
        let sample = match levels {
            0 => sample_in_time(sampler, &ThreadId::current().unwrap()).unwrap(),
            _ => deep(levels - 1, sampler),
        };
        std::hint::black_box(room);
        sample
    }
    let sample = deep(40, &Sampler::install().unwrap());
    assert!(sample.cut_off);
    assert_eq!(sample.words.len(), STACK_BYTES_MAX / 8);
}

#[test]
fn a_thread_that_does_not_answer_costs_the_timeout_and_a_late_answer_harms_nobody() {
    let sampler = Sampler::install().unwrap();
    let (send, receive) = mpsc::channel();
    let (release, hold) = mpsc::channel::<()>();
    let worker = std::thread::spawn(move || {
        // SAFETY: `signals` is live and initialised by the first call.
        let set = |how| unsafe {
            let mut signals = MaybeUninit::uninit();
            libc::sigfillset(signals.as_mut_ptr());
            libc::pthread_sigmask(how, signals.as_ptr(), ptr::null_mut());
        };
        set(libc::SIG_BLOCK);
        send.send(ThreadId::current().unwrap()).unwrap();
        let _ = hold.recv();
        // The signals that were held back arrive here.
        set(libc::SIG_UNBLOCK);
        send.send(ThreadId::current().unwrap()).unwrap();
        let _ = hold.recv();
    });
    let thread = receive.recv().unwrap();
    let refused = sampler.sample(&thread, Duration::from_millis(20));
    assert!(matches!(refused, Err(SampleError::NoAnswer { .. })), "{refused:?}");
    // Another is not kept from it.
    sample_in_time(&sampler, &ThreadId::current().unwrap()).unwrap();
    release.send(()).unwrap();
    receive.recv().unwrap();
    assert!(sample_in_time(&sampler, &thread).is_ok());
    drop(release);
    worker.join().unwrap();
}

#[test]
fn samplers_of_two_servers_take_turns() {
    let (send, receive) = mpsc::channel();
    let (release, hold) = mpsc::channel::<()>();
    let worker = std::thread::spawn(move || {
        send.send(ThreadId::current().unwrap()).unwrap();
        let _ = hold.recv();
    });
    let thread = receive.recv().unwrap();
    let ask = |thread: ThreadId| {
        std::thread::spawn(move || {
            let sampler = Sampler::install().unwrap();
            let own = ThreadId::current().unwrap();
            (0..500).all(|_| sample_in_time(&sampler, &thread).is_ok() && sample_in_time(&sampler, &own).is_ok())
        })
    };
    let servers = [ask(thread.clone()), ask(thread)];
    for server in servers {
        assert!(server.join().unwrap());
    }
    drop(release);
    worker.join().unwrap();
}

/// Runs this test alone in a process of its own, where nobody else holds a sampler. True in that process.
fn alone(test: &str) -> bool {
    const MARK: &str = "RINGLEADER_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let name = format!("sys::stack_sample::tests::{test}");
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", &name, "--test-threads=1", "--nocapture"]).env(MARK, "1").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
    false
}

fn handler(signal: libc::c_int) -> libc::sighandler_t {
    action(signal).unwrap().sa_sigaction
}

#[test]
fn the_signal_is_given_back_with_the_last_sampler_and_nobody_dies_of_one_that_was_under_way() {
    if !alone("the_signal_is_given_back_with_the_last_sampler_and_nobody_dies_of_one_that_was_under_way") {
        return;
    }
    let (first, second) = (Sampler::install().unwrap(), Sampler::install().unwrap());
    let signal = first.signal;
    drop(first);
    assert_ne!(handler(signal), libc::SIG_DFL);
    // SAFETY: `signals` is live and initialised by the first call.
    let set = |how| unsafe {
        let mut signals = MaybeUninit::uninit();
        libc::sigfillset(signals.as_mut_ptr());
        libc::pthread_sigmask(how, signals.as_ptr(), ptr::null_mut());
    };
    set(libc::SIG_BLOCK);
    let refused = second.sample(&ThreadId::current().unwrap(), Duration::from_millis(1));
    assert!(matches!(refused, Err(SampleError::NoAnswer { .. })), "{refused:?}");
    drop(second);
    assert_eq!(handler(signal), libc::SIG_DFL);
    // The default action of the signal that is still pending would end the process here.
    set(libc::SIG_UNBLOCK);
}

#[test]
fn signals_that_others_use_are_left_alone() {
    if !alone("signals_that_others_use_are_left_alone") {
        return;
    }
    set_action(libc::SIGRTMAX(), libc::SIG_IGN).unwrap();
    let sampler = Sampler::install().unwrap();
    assert_eq!(sampler.signal, libc::SIGRTMAX() - 1);
    // Somebody takes it over: it is theirs now.
    set_action(sampler.signal, libc::SIG_IGN).unwrap();
    drop(sampler);
    assert_eq!(handler(libc::SIGRTMAX() - 1), libc::SIG_IGN);
    for signal in libc::SIGRTMIN()..=libc::SIGRTMAX() {
        set_action(signal, libc::SIG_IGN).unwrap();
    }
    assert_eq!(Sampler::install().unwrap_err().kind(), io::ErrorKind::AddrInUse);
}
