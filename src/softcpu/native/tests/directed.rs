//! temp
use super::sample::decode;
use crate::native::Stubs;
#[test]
fn waitt(){ let mut s=Stubs::new().unwrap(); for b in [&[0x9bu8][..],&[0x9b,0xd9,0x30],&[0x66,0x9b],&[0xc4,0xe3,0xfb,0xf0,0xc1,5]] { let i=decode(64,b); println!("{:?} {:?} {:?} {}",i.code(), s.get(&i), i.code().cpuid_features(), i.is_string_instruction());}}
