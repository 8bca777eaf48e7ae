//! The smallest guest: 16 bytes of code that write a line to the serial port at their entry.
//!
//! It boots by PVH (an ELF with the note that names its 32-bit entry), which lathe-vmm and QEMU both
//! speak, so the same file measures what a machine costs before its guest does anything.

/// The line that the guest prints, without its newline.
pub const MARKER: &str = "!L";

/// Where the code is loaded and entered.
const ENTRY: u32 = 0x10_0000;

/// Bytes before the code in the file: ELF header, two program headers, the note.
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const NOTE: usize = 20;
const HEADERS: usize = ELF_HEADER + 2 * PROGRAM_HEADER;

/// 32-bit protected mode, paging off (the PVH entry state).
const CODE: [u8; 14] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'!', 0xee, // mov al, '!'; out dx, al
    0xb0, b'L', 0xee, // mov al, 'L'; out dx, al
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
    0xf4, // hlt
];

/// The guest as an ELF file.
pub fn elf() -> Vec<u8> {
    let code_at = HEADERS + NOTE;
    let mut file = Vec::with_capacity(code_at + CODE.len());
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(2_u16.to_le_bytes()); // ET_EXEC
    file.extend(62_u16.to_le_bytes()); // EM_X86_64
    file.extend(1_u32.to_le_bytes());
    file.extend(u64::from(ENTRY).to_le_bytes());
    file.extend((ELF_HEADER as u64).to_le_bytes());
    file.extend(0_u64.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    for half in [ELF_HEADER, PROGRAM_HEADER, 2, 64, 0, 0] {
        file.extend((half as u16).to_le_bytes());
    }
    program_header(&mut file, 1, code_at, u64::from(ENTRY), CODE.len());
    program_header(&mut file, 4, HEADERS, 0, NOTE);
    // XEN_ELFNOTE_PHYS32_ENTRY (18): name, then the entry's physical address.
    for word in [4_u32, 4, 18] {
        file.extend(word.to_le_bytes());
    }
    file.extend(*b"Xen\0");
    file.extend(ENTRY.to_le_bytes());
    file.extend(CODE);
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, offset: usize, address: u64, size: usize) {
    file.extend(kind.to_le_bytes());
    file.extend(5_u32.to_le_bytes()); // readable, executable
    for word in [offset as u64, address, address, size as u64, size as u64, 4] {
        file.extend(word.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_lie_where_the_headers_say() {
        let file = elf();
        assert_eq!(file.len(), HEADERS + NOTE + CODE.len());
        assert_eq!(&file[HEADERS + 12..HEADERS + 16], b"Xen\0");
        assert_eq!(file[HEADERS + NOTE..], CODE);
        let load_offset = u64::from_le_bytes(file[ELF_HEADER + 8..ELF_HEADER + 16].try_into().unwrap());
        assert_eq!(load_offset, (HEADERS + NOTE) as u64);
    }
}
