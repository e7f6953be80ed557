//! A small interpreter of bytecode: a load, a jump through a table and a little work each, as interpreters do all day.

use crate::{Kind, Unit, Work};
use std::hint::black_box;

pub(crate) const BYTECODE: Work = Work {
    name: "bytecode",
    phrase: "a stack machine that adds up the lengths of 250 Collatz sequences",
    kind: Kind::Compute,
    operations: 1,
    sum: 11_130,
    prepare,
};

/// An instruction of the stack machine; the argument is a register or a number.
#[derive(Clone, Copy, Debug)]
enum Code {
    /// Pushes a number.
    Push(u32),
    /// Pushes a register.
    Get(u8),
    /// Pops into a register.
    Set(u8),
    /// Pops two, pushes their sum.
    Add,
    /// Pops two, pushes their product.
    Multiply,
    /// Halves the top.
    Halve,
    /// Replaces the top by its lowest bit.
    Odd,
    /// Pops two, pushes whether they are equal.
    Equal,
    /// Goes on elsewhere.
    Jump(u8),
    /// Pops; goes on elsewhere if it was 0.
    Unless(u8),
    /// Pops the result.
    End,
}

/// Steps that every start from 1 to register 0 takes to reach 1, added up in register 1. Register 2 is the number on its way.
const COLLATZ: [Code; 36] = {
    use Code::*;
    [
        // 0: while r0 != 0
        Get(0),
        Push(0),
        Equal,
        Unless(6),
        Get(1),
        End,
        // 6: r2 = r0
        Get(0),
        Set(2),
        // 8: while r2 != 1
        Get(2),
        Push(1),
        Equal,
        Unless(17),
        // 12: r0 -= 1
        Get(0),
        Push(u32::MAX),
        Add,
        Set(0),
        Jump(0),
        // 17: r1 += 1
        Get(1),
        Push(1),
        Add,
        Set(1),
        // 21: r2 = odd ? 3 r2 + 1 : r2 / 2
        Get(2),
        Odd,
        Unless(31),
        Get(2),
        Push(3),
        Multiply,
        Push(1),
        Add,
        Set(2),
        Jump(8),
        // 31
        Get(2),
        Halve,
        Set(2),
        Jump(8),
        End,
    ]
};

fn execute(program: &[Code], start: u32) -> u32 {
    let mut registers = [start, 0, 0, 0];
    let mut stack = [0u32; 16];
    let (mut at, mut top) = (0, 0);
    loop {
        let code = program[at];
        at += 1;
        match code {
            Code::Push(number) => {
                stack[top] = number;
                top += 1;
            }
            Code::Get(register) => {
                stack[top] = registers[usize::from(register)];
                top += 1;
            }
            Code::Set(register) => {
                top -= 1;
                registers[usize::from(register)] = stack[top];
            }
            Code::Add => {
                top -= 1;
                stack[top - 1] = stack[top - 1].wrapping_add(stack[top]);
            }
            Code::Multiply => {
                top -= 1;
                stack[top - 1] = stack[top - 1].wrapping_mul(stack[top]);
            }
            Code::Halve => stack[top - 1] /= 2,
            Code::Odd => stack[top - 1] &= 1,
            Code::Equal => {
                top -= 1;
                stack[top - 1] = u32::from(stack[top - 1] == stack[top]);
            }
            Code::Jump(to) => at = usize::from(to),
            Code::Unless(to) => {
                top -= 1;
                if stack[top] == 0 {
                    at = usize::from(to);
                }
            }
            Code::End => return stack[top - 1],
        }
    }
}

fn prepare() -> Unit {
    Box::new(|| u64::from(execute(black_box(&COLLATZ), black_box(250))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_steps() {
        // From 1: none; 2: 1; 3: 7; 4: 2; 5: 5; 6: 8.
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(|n| execute(&COLLATZ, n)), [0, 0, 1, 8, 10, 15, 23]);
    }
}
