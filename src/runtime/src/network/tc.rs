// SPDX-License-Identifier: Apache-2.0
//! Traffic control: every frame that comes in at one interface leaves by another (tc-mirred(8)).
//!
//! The frame is taken before the host's network stack sees it, so the interface's addresses may
//! stay where they are. `u32` rather than `matchall` matches everything: more kernels have it.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::netlink::Socket;

/// The filter's priority: the number by which it is found again.
const PRIORITY: u32 = 0x6b74;

/// `ETH_P_ALL`, in the byte order of the wire.
const ALL_PROTOCOLS: u16 = 3_u16.to_be();

/// The handle that every ingress qdisc has.
const INGRESS_QDISC: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

/// Whether the interface has a qdisc for what comes in.
pub(super) fn has_ingress(socket: &mut Socket, index: u32) -> io::Result<bool> {
    let list = socket.dump(&RouteNetlinkMessage::GetQueueDiscipline(message(index)?))?;
    Ok(list.iter().any(|message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(qdisc) => {
            u32::try_from(qdisc.header.index) == Ok(index)
                && qdisc.header.parent == TcHandle::INGRESS
        }
        _ => false,
    }))
}

/// Whether what comes in at the interface is redirected already.
pub(super) fn has_redirect(socket: &mut Socket, index: u32) -> io::Result<bool> {
    let mut request = message(index)?;
    request.header.parent = INGRESS_QDISC;
    let list = socket.dump(&RouteNetlinkMessage::GetTrafficFilter(request))?;
    Ok(list.iter().any(|message| match message {
        RouteNetlinkMessage::NewTrafficFilter(filter) => filter.header.info >> 16 == PRIORITY,
        _ => false,
    }))
}

pub(super) fn add_ingress(socket: &mut Socket, index: u32) -> io::Result<()> {
    let message = RouteNetlinkMessage::NewQueueDiscipline(ingress(index)?);
    socket.change(message, NLM_F_CREATE | NLM_F_EXCL)
}

pub(super) fn remove_ingress(socket: &mut Socket, index: u32) -> io::Result<()> {
    let message = RouteNetlinkMessage::DelQueueDiscipline(ingress(index)?);
    socket.change(message, 0)
}

/// From here on, what comes in at `from` leaves by `to`.
pub(super) fn add_redirect(socket: &mut Socket, from: u32, to: u32) -> io::Result<()> {
    let message = RouteNetlinkMessage::NewTrafficFilter(redirect(from, to)?);
    socket.change(message, NLM_F_CREATE | NLM_F_EXCL)
}

pub(super) fn remove_redirect(socket: &mut Socket, from: u32) -> io::Result<()> {
    let message = RouteNetlinkMessage::DelTrafficFilter(filter(from)?);
    socket.change(message, 0)
}

fn message(index: u32) -> io::Result<TcMessage> {
    let index = i32::try_from(index).map_err(io::Error::other)?;
    Ok(TcMessage::with_index(index))
}

fn ingress(index: u32) -> io::Result<TcMessage> {
    let mut message = message(index)?;
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = INGRESS_QDISC;
    let kind = TcAttribute::Kind("ingress".to_owned());
    message.attributes.push(kind);
    Ok(message)
}

/// Names the filter: by the qdisc's handle, its priority and its protocol.
fn filter(index: u32) -> io::Result<TcMessage> {
    let mut message = message(index)?;
    message.header.parent = INGRESS_QDISC;
    message.header.info = (PRIORITY << 16) | u32::from(ALL_PROTOCOLS);
    let kind = TcAttribute::Kind(TcFilterU32::KIND.to_owned());
    message.attributes.push(kind);
    Ok(message)
}

fn redirect(from: u32, to: u32) -> io::Result<TcMessage> {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    // A key of zeroes matches everything.
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let mut message = filter(from)?;
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::U32(TcFilterU32Option::Selector(selector)),
        TcOption::U32(TcFilterU32Option::Action(vec![action])),
    ]));
    Ok(message)
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, Parseable};

    use super::*;

    /// What `tc` sends for `filter add dev 5 parent ffff: protocol all prio 27508 u32 match u8 0 0
    /// action mirred egress redirect dev 7`, by the kernel's headers.
    #[test]
    fn the_redirect_is_tc_s() {
        let message = redirect(5, 7).unwrap();
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let header = [
            0, 0, 0, 0, // family
            5, 0, 0, 0, // interface
            0, 0, 0, 0, // handle
            0, 0, 0xff, 0xff, // parent ffff:
            0, 3, 0x74, 0x6b, // protocol and priority
        ];
        assert_eq!(bytes[..20], header);
        // TCA_KIND
        assert_eq!(bytes[20..28], [8, 0, 1, 0, b'u', b'3', b'2', 0]);
        // TCA_OPTIONS, in it TCA_U32_SEL: terminal, one key that is all zeroes.
        assert_eq!(bytes[30..32], [2, 0]);
        assert_eq!(bytes[32..40], [36, 0, 5, 0, 1, 0, 1, 0]);
        assert_eq!(bytes[40..68], [0; 28]);
        // TCA_U32_ACT, in it action 1 of kind mirred with its parameters.
        let tail = &bytes[68..];
        assert_eq!(tail[2..4], [7, 0]);
        let parameters = &tail[tail.len() - 28..];
        let expected = [
            0, 0, 0, 0, // index
            0, 0, 0, 0, // capab
            4, 0, 0, 0, // TC_ACT_STOLEN
            0, 0, 0, 0, // refcnt
            0, 0, 0, 0, // bindcnt
            1, 0, 0, 0, // TCA_EGRESS_REDIR
            7, 0, 0, 0, // interface
        ];
        assert_eq!(parameters, expected);
        assert_eq!(TcMessage::parse(&bytes).unwrap(), message);
    }

    #[test]
    fn the_ingress_qdisc_is_tc_s() {
        let message = ingress(5).unwrap();
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let expected = [
            0, 0, 0, 0, // family
            5, 0, 0, 0, // interface
            0, 0, 0xff, 0xff, // handle ffff:
            0xf1, 0xff, 0xff, 0xff, // parent
            0, 0, 0, 0, // info
            12, 0, 1, 0, b'i', b'n', b'g', b'r', b'e', b's', b's', 0,
        ];
        assert_eq!(bytes, expected);
    }
}
