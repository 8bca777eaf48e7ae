//! Bridge, interfaces, addresses and routes, over rtnetlink. Every function may be repeated.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use futures_util::TryStreamExt;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol};
use nix::errno::Errno;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::address::{Subnet, mac_of};
use super::{BRIDGE, tap};

/// Marks the routes that are ours among the kernel's (`ip route show proto 76`).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(76);

/// Something about an interface or a route that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Over netlink.
    #[error("cannot {what}: {source}")]
    Netlink {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// An interface that should be there is not.
    #[error("the interface {0} does not exist")]
    Missing(String),
    /// Something else.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
}

fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    let what = what.into();
    move |source| LinkError::Netlink { what, source }
}

pub(super) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> LinkError {
    let what = what.into();
    move |source| LinkError::Io { what, source }
}

fn has_errno(error: &rtnetlink::Error, errno: Errno) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(e) if e.raw_code().abs() == errno as i32)
}

/// A connection to the kernel in the network namespace that this thread is in. Needs a runtime.
///
/// # Errors
/// When the socket cannot be made.
pub fn connect() -> Result<Handle, LinkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(io("open a netlink socket"))?;
    tokio::spawn(connection);
    Ok(handle)
}

/// The index of an interface, if it exists.
///
/// # Errors
/// When the kernel does not answer.
pub async fn index_of(handle: &Handle, name: &str) -> Result<Option<u32>, LinkError> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(error) if has_errno(&error, Errno::ENODEV) => Ok(None),
        Err(error) => Err(netlink(format!("look up {name}"))(error)),
    }
}

async fn existing(handle: &Handle, name: &str) -> Result<u32, LinkError> {
    index_of(handle, name).await?.ok_or_else(|| LinkError::Missing(name.to_owned()))
}

/// The names of all interfaces that begin with `prefix`.
///
/// # Errors
/// When the kernel does not answer.
pub async fn names_with(handle: &Handle, prefix: &str) -> Result<Vec<String>, LinkError> {
    let links: Vec<_> =
        handle.link().get().execute().try_collect().await.map_err(netlink("list interfaces"))?;
    let names = links.into_iter().flat_map(|link| link.attributes).filter_map(|attribute| match attribute {
        LinkAttribute::IfName(name) if name.starts_with(prefix) => Some(name),
        _ => None,
    });
    Ok(names.collect())
}

/// Makes the bridge, with the subnet's first address and no other, and lets the host forward.
///
/// # Errors
/// When the kernel refuses.
pub async fn ensure_bridge(handle: &Handle, subnet: Subnet) -> Result<(), LinkError> {
    let what = || netlink(format!("make the bridge {BRIDGE}"));
    let index = match index_of(handle, BRIDGE).await? {
        Some(index) => index,
        None => {
            let bridge = LinkBridge::new(BRIDGE).forward_delay(0).mcast_snooping(false);
            handle.link().add(bridge.build()).execute().await.map_err(what())?;
            existing(handle, BRIDGE).await?
        }
    };
    // A bridge without a fixed address takes its ports' and changes when one goes: sandboxes would
    // talk to a gateway that is not there any more.
    let up = LinkUnspec::new_with_index(index).address(mac_of(subnet.gateway()).to_vec()).up();
    handle.link().change(up.build()).execute().await.map_err(what())?;
    let addresses: Vec<_> = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await
        .map_err(netlink(format!("list the addresses of {BRIDGE}")))?;
    let mut there = false;
    for address in addresses {
        let local = address.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(std::net::IpAddr::V4(local)) => Some(*local),
            _ => None,
        });
        let wanted = local == Some(subnet.gateway()) && address.header.prefix_len == subnet.prefix();
        there |= wanted;
        if !wanted && local.is_some() {
            handle.address().del(address).execute().await.map_err(netlink("remove an old address"))?;
        }
    }
    if !there {
        let add = handle.address().add(index, subnet.gateway().into(), subnet.prefix());
        add.execute().await.map_err(netlink(format!("give {BRIDGE} its address")))?;
    }
    sysctl("net/ipv4/ip_forward", "1")?;
    // Sandboxes speak IPv4 only; a link-local address of the host would be one more way to it.
    let _ = sysctl(&format!("net/ipv6/conf/{BRIDGE}/disable_ipv6"), "1");
    Ok(())
}

fn sysctl(name: &str, value: &str) -> Result<(), LinkError> {
    std::fs::write(format!("/proc/sys/{name}"), value).map_err(io(format!("set {name}")))
}

/// Makes the routes to other nodes' subnets exactly these.
///
/// # Errors
/// When the kernel refuses one; the others are made all the same.
pub async fn ensure_routes(handle: &Handle, wanted: &[(Subnet, Ipv4Addr)]) -> Result<(), LinkError> {
    let mut result = Ok(());
    for (subnet, via) in wanted {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(subnet.network(), subnet.prefix())
            .gateway(*via)
            .protocol(PROTOCOL)
            .build();
        if let Err(error) = handle.route().add(route).replace().execute().await {
            result = Err(netlink(format!("route {subnet} via {via}"))(error));
        }
    }
    for (route, subnet) in ours(handle).await? {
        if !wanted.iter().any(|(w, _)| (w.network(), w.prefix()) == subnet) {
            let removed = handle.route().del(route).execute().await;
            removed.map_err(netlink("remove a route to a node that is gone"))?;
        }
    }
    result
}

async fn ours(handle: &Handle) -> Result<Vec<(RouteMessage, (Ipv4Addr, u8))>, LinkError> {
    let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let routes: Vec<_> =
        handle.route().get(all).execute().try_collect().await.map_err(netlink("list routes"))?;
    let ours = routes.into_iter().filter(|route| route.header.protocol == PROTOCOL).filter_map(|route| {
        let destination = route.attributes.iter().find_map(|a| match a {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        })?;
        let prefix = route.header.destination_prefix_length;
        Some((route, (destination, prefix)))
    });
    Ok(ours.collect())
}

/// Makes a persistent tap device on the bridge.
///
/// # Errors
/// When `/dev/net/tun` is missing or the kernel refuses.
pub async fn ensure_tap(handle: &Handle, name: &str) -> Result<(), LinkError> {
    if index_of(handle, name).await?.is_none() {
        tap::make(name).map_err(io(format!("make the tap device {name}")))?;
    }
    join_bridge(handle, name, BRIDGE).await
}

async fn join_bridge(handle: &Handle, name: &str, bridge: &str) -> Result<(), LinkError> {
    let bridge_index = existing(handle, bridge).await?;
    let index = existing(handle, name).await?;
    let _ = sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1");
    let join = LinkUnspec::new_with_index(index).controller(bridge_index).up();
    handle.link().change(join.build()).execute().await.map_err(netlink(format!("put {name} on {bridge}")))
}

/// Removes an interface; that it is not there is success.
///
/// # Errors
/// When the kernel refuses.
pub async fn remove(handle: &Handle, name: &str) -> Result<(), LinkError> {
    let Some(index) = index_of(handle, name).await? else { return Ok(()) };
    match handle.link().del(index).execute().await {
        Err(error) if !has_errno(&error, Errno::ENODEV) => Err(netlink(format!("remove {name}"))(error)),
        _ => Ok(()),
    }
}

/// A container's end of its network.
#[derive(Clone, Debug)]
pub struct ContainerLink<'a> {
    /// The host's interface.
    pub name: &'a str,
    /// The bridge it joins.
    pub bridge: &'a str,
    /// The container's hardware address.
    pub mac: [u8; 6],
    /// The container's address.
    pub address: Ipv4Addr,
    /// Its prefix length.
    pub prefix: u8,
    /// Where everything else is.
    pub gateway: Option<Ipv4Addr>,
    /// In bytes.
    pub mtu: u16,
}

/// Connects the network namespace `netns` to the bridge by a veth pair whose inner end is `eth0`.
/// The kernel removes both ends when the namespace dies.
///
/// The caller is a single-threaded process: its namespace changes for a moment.
///
/// # Errors
/// When the kernel refuses.
pub async fn connect_container(netns: &std::fs::File, link: &ContainerLink<'_>) -> Result<(), LinkError> {
    let outer = connect()?;
    // An interface of that name is a dead predecessor's.
    remove(&outer, link.name).await?;
    // The peer is born inside: its name cannot clash with the host's.
    let inside = LinkUnspec::new_with_name("eth0")
        .address(link.mac.to_vec())
        .mtu(link.mtu.into())
        .setns_by_fd(netns.as_raw_fd());
    let veth = LinkVeth::new(link.name, "eth0").mtu(link.mtu.into()).set_info_data(
        netlink_packet_route::link::InfoData::Veth(netlink_packet_route::link::InfoVeth::Peer(
            inside.build(),
        )),
    );
    let made = outer.link().add(veth.build()).execute().await;
    made.map_err(netlink(format!("make the veth pair {}", link.name)))?;
    join_bridge(&outer, link.name, link.bridge).await?;

    let inner = connect_in(netns)?;
    for name in ["lo", "eth0"] {
        let index = existing(&inner, name).await?;
        let up = LinkUnspec::new_with_index(index).up();
        inner.link().change(up.build()).execute().await.map_err(netlink(format!("bring up {name}")))?;
    }
    let index = existing(&inner, "eth0").await?;
    let add = inner.address().add(index, link.address.into(), link.prefix);
    add.execute().await.map_err(netlink("give the container its address"))?;
    if let Some(gateway) = link.gateway {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        inner.route().add(route).execute().await.map_err(netlink("give the container its route"))?;
    }
    Ok(())
}

/// A connection whose socket was made inside `netns`; it stays there when the thread comes back.
fn connect_in(netns: &std::fs::File) -> Result<Handle, LinkError> {
    use nix::sched::{CloneFlags, setns};
    let what = || io("enter the container's network namespace");
    let home = std::fs::File::open("/proc/self/ns/net").map_err(what())?;
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(|e| what()(e.into()))?;
    let handle = connect();
    setns(home, CloneFlags::CLONE_NEWNET).map_err(|e| what()(e.into()))?;
    handle
}
