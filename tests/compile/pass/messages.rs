//! Messages to state that is not `Send`, by closures of either kind, whose argument is inferred.

use ringleader::test::App;
use ringleader::{Body, BoxError, Call, Request, Response, Server, Shard, Sharded, SlotId, service_fn};
use std::cell::Cell;

struct State(Cell<u8>);

fn asynchronous(states: &Sharded<State>, to: SlotId) -> Call<u8> {
    states.call(to, async |state| state.0.get())
}

fn plain(states: &Sharded<State>, to: SlotId) -> Call<u8> {
    states.call(to, move |state| async move { state.0.get() })
}

pub fn main() -> Result<(), BoxError> {
    let mut builder = Server::builder().executors(2);
    let states = builder.sharded("states", async |_| Ok(State(Cell::new(7))));
    let app = App::with(builder, async move |shard: Shard| {
        let states = states.clone();
        Ok(service_fn(async move |_: Request| {
            let mut sum = 0;
            for slot in &shard.peers() {
                sum += asynchronous(&states, slot).await? + plain(&states, slot).await?;
            }
            Ok(Response::new(Body::from(sum.to_string())))
        }))
    })?;
    assert_eq!(app.get("/")?.body(), "28");
    Ok(())
}
