//! Software for a machine in real mode, small enough to be read: it prints a text on the first serial port, echoes what it
//! is sent, and resets on `R`.

#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfc,             // cld
    0xbe, 0x00, 0x00, // mov si, the text      filled in
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb9, 0x00, 0x00, // mov cx, its length    filled in
    0x2e, 0xac,       // lodsb from cs
    0xee,             // out dx, al
    0xe2, 0xfb,       // loop
    0xba, 0xfd, 0x03, // mov dx, 0x3fd         line status
    0xec,             // in al, dx
    0xa8, 0x01,       // test al, 1            received something?
    0x74, 0xf8,       // jz back
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec,             // in al, dx
    0xee,             // out dx, al            the echo
    0x3c, 0x52,       // cmp al, 'R'
    0x75, 0xef,       // jne to the line status
    0xb0, 0x06,       // mov al, 6
    0xba, 0xf9, 0x0c, // mov dx, 0xcf9         reset control
    0xee,             // out dx, al
    0xf4,             // hlt
    0xeb, 0xfd,       // jmp to the hlt
];

/// The code with its text behind it, for being loaded at this offset in its segment.
pub(crate) fn software(offset: u16, text: &str) -> Vec<u8> {
    // A text of more than 64 KiB has no place in real mode, and would be seen to be cut off.
    let length = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX);
    let mut all = [CODE, text.as_bytes()].concat();
    all[2..4].copy_from_slice(&(offset + length(CODE.len())).to_le_bytes());
    all[8..10].copy_from_slice(&length(text.len()).to_le_bytes());
    all
}
