// SPDX-License-Identifier: Apache-2.0
//! Pods' networks: a bridge with both address families.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result, ensure};
use tests::cni::{GATEWAYS, Network};
use tests::confined::{Expected, expect_confined};
use tests::cri::LIMIT;
use tests::cri::messages::DNSConfig;
use tests::descriptors::{Descriptors, expect_no_more};
use tests::pod::{Container, Pod, Spec};
use tests::procs;
use tests::scenario::{Outcome, pod_scenario, pod_vm_scenario};
use tests::wait::until;

/// A server of the file `page`, for both families.
const SERVER: &str = "mkdir /www; echo from $(hostname) > /www/page; exec httpd -f -p 8080 -h /www";

/// An address as it stands in a URL.
fn host(address: &str) -> String {
    if address.contains(':') {
        format!("[{address}]")
    } else {
        address.to_owned()
    }
}

/// Fetches a page by a container's own client, once its server is up.
fn fetch(container: &Container, url: &str) -> Result<String> {
    container.shell(&format!(
        "for i in $(seq 100); do wget -q -O - {url} 2>/dev/null && exit; sleep 0.1; done; \
         exec wget -O - {url}"
    ))
}

#[test]
fn containers_of_a_pod_meet_on_localhost() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "local")?;
        pod.start_script("server", SERVER)?;
        let client = pod.start_script("client", "exec sleep 1000")?;
        for address in ["127.0.0.1", "::1"] {
            let page = fetch(&client, &format!("http://{}:8080/page", host(address)))?;
            ensure!(page == "from local", "{address}: {page}");
        }
        pod.remove()
    })
}

#[test]
fn the_vmm_of_a_pod_holds_its_tap_and_no_path() -> Outcome {
    let name = "the_vmm_of_a_pod_holds_its_tap_and_no_path";
    pod_vm_scenario(name, |node| {
        let pod = Pod::run(node, "confined")?;
        let (shim, vmm) = (procs::shim(&pod.id)?, procs::vmm(&pod.id)?);
        expect_confined(&shim, &vmm, Expected { vcpus: 1, taps: 1 })?;
        // Containers that come and go leave nothing open in the shim.
        let run = |name: &str| {
            let container = pod.start_script(name, "echo up")?;
            ensure!(container.wait(LIMIT)? == 0, "exit code");
            container.remove()
        };
        run("first")?;
        let descriptors = Descriptors::of(&shim)?;
        for number in 0..3 {
            run(&format!("c{number}"))?;
        }
        expect_no_more(&[(shim, descriptors)], LIMIT)?;
        pod.remove()
    })
}

#[test]
fn the_node_reaches_a_pod_and_a_pod_the_node() -> Outcome {
    pod_scenario(|node| {
        let pod = Pod::run(node, "served")?;
        let container = pod.start_script("server", SERVER)?;
        let addresses = pod.addresses()?;
        for (address, gateway) in addresses.iter().zip(GATEWAYS) {
            let page = until("an answer of the pod", LIMIT, || Ok(get(address).ok()))
                .with_context(|| format!("{:?}", get(address)))?;
            ensure!(page.contains("from served"), "{address}: {page}");

            let ip: IpAddr = gateway.parse()?;
            let listener =
                TcpListener::bind((ip, 0)).with_context(|| format!("listening on {gateway}"))?;
            let port = listener.local_addr()?.port();
            let answering = thread::spawn(move || -> Result<String> {
                let (mut stream, peer) = listener.accept()?;
                let mut request = [0; 4096];
                let length = stream.read(&mut request)?;
                ensure!(length > 0, "an empty request");
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom the node\n")?;
                Ok(peer.ip().to_string())
            });
            let url = format!("http://{}:{port}/", host(gateway));
            let page = container.shell(&format!("wget -q -O - {url}"))?;
            ensure!(page == "from the node", "{url}: {page}");
            let peer = answering
                .join()
                .map_err(|_| anyhow::anyhow!("panicked"))??;
            ensure!(peer == *address, "{peer} asked, the pod has {address}");
        }
        pod.remove()
    })
}

fn get(address: &str) -> Result<String> {
    let ip: IpAddr = address.parse()?;
    let mut stream = TcpStream::connect((ip, 8080))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

#[test]
fn bulk_between_pods_arrives_whole() -> Outcome {
    pod_scenario(|node| {
        for network in [Network::Bridge, Network::Jumbo] {
            let from = Spec::new("from").on(network).run(node)?;
            let to = Spec::new("to").on(network).run(node)?;
            let receiver = to.start_script("receiver", "exec sleep 1000")?;
            let sender = from.start_script("sender", "exec sleep 1000")?;
            for container in [&receiver, &sender] {
                let mtu = container.shell("cat /sys/class/net/eth0/mtu")?;
                ensure!(mtu == network.mtu().to_string(), "MTU {mtu} on {network:?}");
            }
            for (number, address) in to.addresses()?.iter().enumerate() {
                let port = 9000 + number;
                // Its input has no end, or the sender would take that for the end of all.
                receiver.shell(&format!(
                    "mkfifo /tmp/open{number}; \
                     (nc -l -p {port} <> /tmp/open{number} | sha256sum > /tmp/sum{number}) \
                     > /dev/null 2>&1 & \
                     until netstat -ltn | grep -q :{port}; do sleep 0.1; done"
                ))?;
                let sent = sender.shell(&format!(
                    "head -c 8388608 /dev/urandom > /tmp/data; sha256sum < /tmp/data; \
                     nc {address} {port} < /tmp/data"
                ))?;
                let received = receiver.shell(&format!(
                    "until [ -s /tmp/sum{number} ]; do sleep 0.1; done; cat /tmp/sum{number}"
                ))?;
                ensure!(sent == received, "{address}: {sent} became {received}");
            }
            from.remove()?;
            to.remove()?;
        }
        Ok(())
    })
}

#[test]
fn name_servers_host_name_and_sysctls_are_the_pod_s() -> Outcome {
    pod_scenario(|node| {
        let mut spec = Spec::new("named").with_sysctl("net.ipv4.ip_unprivileged_port_start", "80");
        spec.config.dns_config = Some(DNSConfig {
            servers: vec!["10.88.0.53".to_owned()],
            searches: vec!["pods.test".to_owned()],
            options: vec!["ndots:5".to_owned()],
            ..Default::default()
        })
        .into();
        let pod = spec.run(node)?;
        let container = pod.start_script("main", "exec sleep 1000")?;
        let names = container.shell("cat /etc/resolv.conf; cat /etc/hostname; hostname")?;
        for line in [
            "search pods.test",
            "nameserver 10.88.0.53",
            "options ndots:5",
            "named\nnamed",
        ] {
            ensure!(names.contains(line), "no {line:?} in {names}");
        }
        let value = container.shell("cat /proc/sys/net/ipv4/ip_unprivileged_port_start")?;
        ensure!(value == "80", "the sysctl is {value}");
        let routes = container.shell("ip route; ip -6 route")?;
        for gateway in GATEWAYS {
            let route = format!("default via {gateway} dev eth0");
            ensure!(routes.contains(&route), "no {route:?} in {routes}");
        }
        pod.remove()
    })
}
