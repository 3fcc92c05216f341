//! A message through the built-in device, in one process: `cargo run --example soft_loopback`.

use rdma_async::{Config, Domain, Listener, connect};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let domain = Domain::open(Some("soft0"))?;
    let listener = Listener::bind("127.0.0.1:0", &domain, &Config::rc()).await?;
    let address = listener.local_addr();
    let config = Config::rc();
    let (server, client) = tokio::join!(listener.accept(), connect(address, &domain, &config));
    let (server, client) = (server?, client?);
    let mut buffer = client.pool().acquire().await;
    buffer.truncate(20);
    buffer.copy_from_slice(b"hello through RoCEv2");
    client.send(buffer).await.0?;
    println!("received: {}", String::from_utf8_lossy(&server.recv().await?));
    Ok(client.close().await?)
}
