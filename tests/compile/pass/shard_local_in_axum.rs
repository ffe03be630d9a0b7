//! State that is not `Send` in an axum router, and a part of a handler that is not either.

use axum::extract::State;
use axum::{Router, routing::get};
use ringleader::test::App;
use ringleader::{BoxError, Shard, ShardLocal};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

struct Application {
    shard: Shard,
    count: RefCell<u8>,
}

async fn short(State(application): State<ShardLocal<Application>>) -> String {
    *application.count.borrow_mut() += 1;
    application.shard.sleep(Duration::ZERO).await;
    application.count.borrow().to_string()
}

#[expect(
    clippy::await_holding_refcell_ref,
    reason = "nobody else borrows it here; that it may be held is what is shown"
)]
async fn long(State(application): State<ShardLocal<Application>>) -> String {
    let work = async |application: &Application| {
        let count = application.count.borrow_mut();
        application.shard.sleep(Duration::ZERO).await;
        let _ = application.shard.spawn(async { drop(Rc::new(1)) }).await;
        count.to_string()
    };
    application.run(work).await
}

pub fn main() -> Result<(), BoxError> {
    let app = App::start(async |shard: Shard| {
        let application = shard.local(Application { shard: shard.clone(), count: RefCell::new(0) });
        let router = Router::new().route("/short", get(short)).route("/long", get(long));
        Ok(ringleader::axum(router.with_state(application)))
    })?;
    assert_eq!(app.get("/short")?.body(), "1");
    assert_eq!(app.get("/long")?.body(), "1");
    Ok(())
}
