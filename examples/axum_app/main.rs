//! How do I serve my axum application, with all it needs of tokio? And give it state that is one executor's own?
//!
//! `app.rs` is one as it is written for axum's own server: JSON, extractors of its own, middleware, layers of tower-http,
//! streams, timers, tasks, a pool of connections. All that is different is in `main`, which was
//! `axum::serve(listener, app::router(..).into_make_service_with_connect_info::<SocketAddr>())`. The application's tasks run on tokio's threads, its handlers on the executors.
//! `/here` is a route that knows of executors: each has a count of its own, in a `Cell`, behind a handle that is `Send`.
//!
//! ```sh
//! cargo run --example axum_app --features axum,tokio
//! curl -i http://127.0.0.1:8080/packets -H 'authorization: Bearer spade' --json '{"name":"Beet","grams":20}'
//! curl -i http://127.0.0.1:8080/packets/1 && curl -i http://127.0.0.1:8080/packets/1/take -d grams=5
//! curl http://127.0.0.1:8080/demanding/report && curl http://127.0.0.1:8080/here
//! curl -N 'http://127.0.0.1:8080/streams/events?count=1000'
//! curl -i http://127.0.0.1:8080/demanding/wait/10000                          # 408 after 5 s
//! ```

mod app;

use std::cell::Cell;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use ringleader::{BoxError, Server, Shard, ShardLocal};

/// What one executor has: nothing of it need be `Send`.
struct Here {
    shard: Shard,
    asked: Cell<u64>,
}

async fn here(State(here): State<ShardLocal<Here>>) -> String {
    here.asked.set(here.asked.get() + 1);
    format!("executor {} was asked {} times\n", here.shard.id(), here.asked.get())
}

fn main() -> Result<(), BoxError> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    tracing_subscriber::fmt().with_env_filter("info,tower_http=debug").init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let router = {
        let _inside = runtime.enter();
        app::router(app::Settings::default())
    };
    // Every executor serves a clone; what is behind the application's `Arc`s is one for all, as with axum's own server.
    let server = Server::builder().listen(address).tokio(runtime.handle().clone()).stop_on_signals();
    let server = server.serve(async move |shard: Shard| {
        let state = shard.local(Here { shard: shard.clone(), asked: Cell::new(0) });
        let own = Router::new().route("/here", get(here)).with_state(state);
        Ok(ringleader::axum(router.clone().merge(own)).connect_info())
    });
    server.run()?;
    Ok(())
}
