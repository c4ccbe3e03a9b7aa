// SPDX-License-Identifier: GPL-2.0

//! Credit: how many bytes a sender may have on their way (virtio 5.10.6.3).
//!
//! All counters run freely and wrap at 2^32; only differences between them mean anything.

/// What we may send: our view of the peer's receive buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SendCredit {
    /// Bytes that we have sent since the connection began.
    tx_cnt: u32,
    /// Bytes that the peer has consumed, as it told us last.
    peer_fwd_cnt: u32,
    /// Size of the peer's receive buffer, as it told us last.
    peer_buf_alloc: u32,
}

impl SendCredit {
    /// Bytes that may be sent now.
    ///
    /// `limit` caps what the peer offers: a peer that advertises a huge buffer does not make us queue
    /// more than our own buffer size allows. A peer that shrinks its buffer below what is on its way
    /// leaves no room, not a negative amount of it.
    pub fn available(&self, limit: u32) -> u32 {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.min(limit).saturating_sub(in_flight)
    }

    /// The longest message that the peer can take, once it has room for it.
    pub fn largest_message(&self, limit: u32) -> u32 {
        self.peer_buf_alloc.min(limit)
    }

    /// Takes up to `wanted` bytes of credit and returns how many it took.
    pub fn take(&mut self, wanted: u32, limit: u32) -> u32 {
        let taken = wanted.min(self.available(limit));
        self.tx_cnt = self.tx_cnt.wrapping_add(taken);
        taken
    }

    /// Whether nothing was sent, as far as a peer can tell that has not said anything since.
    pub fn is_untouched(&self) -> bool {
        self.tx_cnt == 0
    }

    /// Gives back credit that was taken for bytes which are not sent after all.
    pub fn give_back(&mut self, unused: u32) {
        self.tx_cnt = self.tx_cnt.wrapping_sub(unused);
    }

    /// Notes what a packet of the peer says about its receive buffer.
    pub fn update(&mut self, peer_buf_alloc: u32, peer_fwd_cnt: u32) {
        self.peer_buf_alloc = peer_buf_alloc;
        self.peer_fwd_cnt = peer_fwd_cnt;
    }
}

/// What the peer may send: our receive buffer.
///
/// The counts are 64 bits wide here, so that they can be compared; on the wire they are cut to 32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ReceiveCredit {
    /// Size of our receive buffer.
    buf_alloc: u32,
    /// Bytes of packets that have left the buffer since the connection began.
    fwd_cnt: u64,
    /// `buf_alloc` as the peer knows it.
    advertised_buf_alloc: u32,
    /// `fwd_cnt` as the peer knows it.
    advertised_fwd_cnt: u64,
    /// Size of the peer's own receive buffer, as it told us last.
    peer_buf_alloc: u32,
    /// How many bytes the peer was ever allowed to send since the connection began.
    allowed: u64,
    /// Bytes of the packets that are in the buffer, read in part or not at all.
    held: u32,
    /// Bytes of those that have not been read.
    unread: u32,
}

/// The peer has sent more than its credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditExceeded;

/// The credit that a packet carries: its `buf_alloc` and `fwd_cnt` fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advertisement {
    /// Size of the receive buffer.
    pub buf_alloc: u32,
    /// Bytes that have left it.
    pub fwd_cnt: u32,
}

impl ReceiveCredit {
    /// A buffer of `buf_alloc` bytes with nothing in it.
    pub fn new(buf_alloc: u32) -> Self {
        ReceiveCredit {
            buf_alloc,
            peer_buf_alloc: u32::MAX,
            ..Default::default()
        }
    }

    /// Bytes that a reader can get.
    pub fn unread(&self) -> u32 {
        self.unread
    }

    /// Size of the buffer.
    pub fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Changes the size of the buffer. It may become smaller than what is in it, or on its way.
    pub fn set_buf_alloc(&mut self, buf_alloc: u32) {
        self.buf_alloc = buf_alloc;
    }

    /// Notes what a packet of the peer says of the size of its receive buffer; returns whether that has shrunk.
    ///
    /// Linux never has more on its way than the size of its own receive buffer, so a peer may wait for news while
    /// there is plenty of room for it. After a shrink it may wait for what was not worth an update before:
    /// [`wants_update`](Self::wants_update) is to be asked again.
    pub fn note_peer_buf_alloc(&mut self, peer_buf_alloc: u32) -> bool {
        let shrank = peer_buf_alloc < self.peer_buf_alloc;
        self.peer_buf_alloc = peer_buf_alloc;
        shrank
    }

    /// Takes in a packet of `len` bytes.
    ///
    /// A peer may use all the credit that it was ever given, also when the buffer has become smaller since.
    pub fn receive(&mut self, len: u32) -> Result<(), CreditExceeded> {
        let held = self.held.checked_add(len).ok_or(CreditExceeded)?;
        let sent = self.fwd_cnt + u64::from(held);
        if sent > self.allowed.max(self.fwd_cnt + u64::from(self.buf_alloc)) {
            return Err(CreditExceeded);
        }
        self.held = held;
        self.unread += len;
        Ok(())
    }

    /// Notes that `read` bytes were read, and that packets of `freed` bytes left the buffer thereby.
    ///
    /// On a stream, credit goes back to the peer by whole packets, when their memory is free again. On a
    /// seqpacket socket it goes back by messages (`freed` is `read`): the rest of a message may need it.
    /// A reader may then wait for no more than the buffer holds besides a packet of which one byte is left.
    pub fn consume(&mut self, read: u32, freed: u32) {
        // No more than there is, whatever the caller says.
        let freed = freed.min(self.held);
        self.held -= freed;
        self.unread = self.unread.saturating_sub(read).min(self.held);
        self.fwd_cnt += u64::from(freed);
    }

    /// The credit for a packet that is about to be made.
    pub fn advertisement(&self) -> Advertisement {
        Advertisement {
            buf_alloc: self.buf_alloc,
            // Cut to 32 bits, as the wire has it.
            fwd_cnt: self.fwd_cnt as u32,
        }
    }

    /// Notes that a packet with the present [`advertisement`](Self::advertisement) is on its way.
    pub fn advertised(&mut self) {
        self.advertised_buf_alloc = self.buf_alloc;
        self.advertised_fwd_cnt = self.fwd_cnt;
        self.advertised_before_older();
    }

    /// The same, where packets with an older advertisement follow: the peer may use this one until it gets those.
    pub fn advertised_before_older(&mut self) {
        self.allowed = self.allowed.max(self.fwd_cnt + u64::from(self.buf_alloc));
    }

    /// Bytes of room that the peer does not know of: freed since it was told, or by which the buffer grew.
    pub fn unadvertised(&self) -> u32 {
        let freed = self.fwd_cnt - self.advertised_fwd_cnt;
        let grown = self.buf_alloc.saturating_sub(self.advertised_buf_alloc);
        u32::try_from(freed + u64::from(grown)).unwrap_or(u32::MAX)
    }

    /// Bytes that the peer surely sends if it has them, going by what it was told.
    fn peer_may_send(&self) -> u32 {
        let window = self.advertised_buf_alloc.min(self.peer_buf_alloc);
        let freed = self.fwd_cnt - self.advertised_fwd_cnt;
        let in_flight = u32::try_from(freed + u64::from(self.held)).unwrap_or(u32::MAX);
        window.saturating_sub(in_flight)
    }

    /// What the peer can use of the buffer, in bytes.
    pub fn window(&self) -> u32 {
        self.buf_alloc.min(self.peer_buf_alloc)
    }

    /// Whether the peer should be told of room now, when a reader waits for `low_water` bytes.
    ///
    /// Yes where the peer may not send what the reader waits for, and where there is news of three quarters
    /// of what the peer can use. Everything else can wait for the next packet that goes to the peer anyway.
    pub fn wants_update(&self, low_water: u32) -> bool {
        let unadvertised = self.unadvertised();
        if unadvertised == 0 {
            return false;
        }
        let reader_starves = self.unread.saturating_add(self.peer_may_send()) < low_water;
        // The rest keeps the reader busy until the peer has sent more.
        let most_of_window = self.window() / 4 * 3;
        reader_starves || unadvertised >= most_of_window
    }
}
