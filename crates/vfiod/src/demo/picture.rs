//! A picture small enough to show with letters.

/// Of mdpy's `vga` type.
const WIDTH: usize = 640;
const PIXEL: usize = 4;

/// What is drawn, a letter for sixteen by sixteen pixels.
const LINES: [&str; 5] = [
    "#   # #### # ####",
    "#   # #    # #  #",
    " # #  ###  # #  #",
    " # #  #    # #  #",
    "  #   #    # ####",
];
const CELL: usize = 16;

/// Rows of pixels as `(offset, bytes)`.
pub(super) fn draw() -> Vec<(usize, Vec<u8>)> {
    let mut rows = Vec::new();
    for (y, line) in LINES.iter().enumerate() {
        let row: Vec<u8> = line
            .bytes()
            .flat_map(|letter| [if letter == b'#' { 0xff } else { 0 }; CELL * PIXEL])
            .collect();
        for pixel in 0..CELL {
            rows.push(((y * CELL + pixel) * WIDTH * PIXEL, row.clone()));
        }
    }
    rows
}

/// The picture read back: one pixel of each cell, by `read(offset)`.
pub(super) fn look<E>(mut read: impl FnMut(usize) -> Result<u8, E>) -> Result<Vec<String>, E> {
    let mut lines = Vec::new();
    for (y, drawn) in LINES.iter().enumerate() {
        let mut line = String::new();
        for x in 0..drawn.len() {
            let (row, column) = (y * CELL + CELL / 2, x * CELL + CELL / 2);
            let on = read((row * WIDTH + column) * PIXEL)? != 0;
            line.push(if on { '#' } else { ' ' });
        }
        lines.push(line);
    }
    Ok(lines)
}

/// True for what [`draw`] draws.
pub(super) fn is_ours(lines: &[String]) -> bool {
    lines == LINES
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_drawn_is_what_is_seen() {
        let mut memory = vec![0u8; 640 * 480 * 4];
        for (offset, row) in super::draw() {
            memory[offset..offset + row.len()].copy_from_slice(&row);
        }
        let seen = super::look(|at| Ok::<u8, ()>(memory[at])).unwrap();
        assert!(super::is_ours(&seen));
        let empty = super::look(|_| Ok::<u8, ()>(0)).unwrap();
        assert!(!super::is_ours(&empty));
    }
}
