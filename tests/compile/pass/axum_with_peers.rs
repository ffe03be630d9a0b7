//! From inside an axum router: questions to all executors, and tasks that are not `Send`.

use axum::{Router, extract::State, http::StatusCode, routing::get};
use ringleader::test::App;
use ringleader::{BoxError, Server, Shard, ShardLocal, Sharded};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

type Rooms = RefCell<Vec<Rc<Cell<u64>>>>;

struct Application {
    shard: Shard,
    rooms: Sharded<Rooms>,
    hits: Cell<u64>,
}

async fn count(State(application): State<ShardLocal<Application>>) -> Result<String, StatusCode> {
    let members = application.rooms.call_all(async |rooms| rooms.borrow().len()).await;
    let members = members.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let members: Vec<_> = members.into_iter().map(|(slot, length)| (slot.index(), length.ok())).collect();
    let open = async |application: &Application| {
        let room = application.shard.spawn(async { Rc::new(Cell::new(1)) }).await;
        application.rooms.local(&application.shard).borrow_mut().extend(room);
        application.hits.set(application.hits.get() + 1);
    };
    application.run(open).await;
    Ok(format!("{members:?} {}", application.hits.get()))
}

pub fn main() -> Result<(), BoxError> {
    let mut builder = Server::builder().executors(2);
    let rooms = builder.sharded("rooms", async |_| Ok(Rooms::default()));
    let app = App::with(builder, async move |shard: Shard| {
        let state = Application { shard: shard.clone(), rooms: rooms.clone(), hits: Cell::new(0) };
        Ok(ringleader::axum(Router::new().route("/n", get(count)).with_state(shard.local(state))))
    })?;
    assert_eq!(app.get("/n")?.body(), "[(0, Some(0)), (1, Some(0))] 1");
    assert_eq!(app.get("/n")?.body(), "[(0, Some(1)), (1, Some(0))] 2");
    Ok(())
}
