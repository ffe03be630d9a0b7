//! Endpoints that break things on purpose, for demonstrations and tests. Only with `--chaos`.

use std::time::{Duration, Instant};

use http::HeaderValue;
use ringleader::{BoxError, Reject, Request, Response, Shard, StatusCode};

use super::app::answer;

/// A minute: the most that `/chaos/spin`, `/chaos/block` and `/chaos/sleep` do.
const MILLISECONDS_MAX: u64 = 60_000;

pub(crate) async fn respond(shard: &Shard, request: &Request) -> Result<Response, BoxError> {
    let done = |text: &'static str| Ok(answer(HeaderValue::from_static("text/plain; charset=utf-8"), text));
    match request.uri().path() {
        "/chaos/panic" => panic!("ordered by /chaos/panic"),
        "/chaos/escape" => {
            shard.background("chaos", async { panic!("ordered by /chaos/escape") });
            done("a panic is on its way\n")
        }
        "/chaos/abort" => {
            let _panics_too = PanicsOnDrop;
            panic!("ordered by /chaos/abort")
        }
        "/chaos/spin" => {
            let until = Instant::now() + milliseconds(request)?;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            done("spun\n")
        }
        "/chaos/block" => {
            std::thread::sleep(milliseconds(request)?);
            done("blocked\n")
        }
        "/chaos/offload" => {
            let time = milliseconds(request)?;
            shard.spawn_blocking(move || std::thread::sleep(time)).await?;
            done("offloaded\n")
        }
        "/chaos/sleep" => {
            shard.sleep(milliseconds(request)?).await;
            done("slept\n")
        }
        _ => Err(Reject::new(
            StatusCode::NOT_FOUND,
            "there is /chaos/panic, escape, abort, and spin, block, offload and sleep with ?ms=N",
        )
        .into()),
    }
}

/// A drop that panics while a panic unwinds its frame: nothing can catch that.
struct PanicsOnDrop;

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        panic!("the drop panics while the first panic unwinds");
    }
}

fn milliseconds(request: &Request) -> Result<Duration, Reject> {
    let query = request.uri().query().unwrap_or_default();
    let asked = query.split('&').find_map(|pair| pair.strip_prefix("ms=")).and_then(|count| count.parse().ok());
    match asked {
        Some(count) if count <= MILLISECONDS_MAX => Ok(Duration::from_millis(count)),
        _ => Err(Reject::new(StatusCode::BAD_REQUEST, format!("give ?ms=N, with N up to {MILLISECONDS_MAX}"))),
    }
}
