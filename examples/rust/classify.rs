//! Runs a bundle of one float32 input and one float32 output on zeros: classify BUNDLE
//!
//!     rustc -O -L FOLDER classify.rs    # the folder with libtoolchain_runtime.so (docs/edge.md)

use std::ffi::{c_char, c_void, CStr, CString};
use std::ptr::{null, null_mut};

const ABI: u32 = 1;
const FLOAT32: i32 = 11;

#[repr(C)]
struct Options {
    size: u32,
    abi: u32,
    target: *const c_char,
    threads: i32,
    flags: u32,
    error: *mut c_char,
    error_bytes: usize,
}

#[repr(C)]
struct TensorInfo {
    size: u32,
    dtype: i32,
    rank: i32,
    name: *const c_char,
    shape: *const i64,
}

#[repr(C)]
struct DimInfo {
    size: u32,
    batch: i32,
    name: *const c_char,
    min: i64,
    max: i64,
}

#[repr(C)]
struct Value {
    name: *const c_char,
    data: *mut c_void,
    bytes: usize,
    dtype: i32,
    rank: i32,
    shape: [i64; 8],
}

enum Handle {}

#[link(name = "toolchain_runtime")]
extern "C" {
    fn tc_runtime_abi() -> u32;
    fn tc_exit_code(status: i32) -> i32;
    fn tc_open(path: *const c_char, options: *const Options, bundle: *mut *mut Handle) -> i32;
    fn tc_close(bundle: *mut Handle);
    fn tc_input(bundle: *const Handle, index: u32, info: *mut TensorInfo) -> i32;
    fn tc_output(bundle: *const Handle, index: u32, info: *mut TensorInfo) -> i32;
    fn tc_dim_at(bundle: *const Handle, index: u32, info: *mut DimInfo) -> i32;
    fn tc_output_shapes(b: *mut Handle, i: *const Value, n: u32, o: *mut Value, m: u32) -> i32;
    fn tc_run(b: *mut Handle, i: *const Value, n: u32, o: *mut Value, m: u32) -> i32;
    fn tc_last_error(bundle: *mut Handle, text: *mut c_char, bytes: usize) -> usize;
}

struct Error {
    status: i32,
    text: String,
}

struct Bundle(*mut Handle);

impl Drop for Bundle {
    fn drop(&mut self) {
        unsafe { tc_close(self.0) }
    }
}

fn text(buffer: &[u8]) -> String {
    CStr::from_bytes_until_nul(buffer).map(|t| t.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Bundle {
    fn open(path: &str) -> Result<Bundle, Error> {
        let mut why = [0u8; 1024];
        let path = CString::new(path).map_err(|e| Error { status: 1, text: e.to_string() })?;
        let mut handle = null_mut();
        let options = Options {
            size: std::mem::size_of::<Options>() as u32,
            abi: ABI,
            target: null(),
            threads: 0,
            flags: 0,
            error: why.as_mut_ptr().cast(),
            error_bytes: why.len(),
        };
        match unsafe { tc_open(path.as_ptr(), &options, &mut handle) } {
            0 => Ok(Bundle(handle)),
            status => Err(Error { status, text: text(&why) }),
        }
    }

    fn check(&self, status: i32) -> Result<(), Error> {
        let mut why = [0u8; 1024];
        if status == 0 {
            return Ok(());
        }
        unsafe { tc_last_error(self.0, why.as_mut_ptr().cast(), why.len()) };
        Err(Error { status, text: text(&why) })
    }

    /// The shape of the first input, every dynamic size at its smallest.
    fn input_shape(&self) -> Result<Vec<i64>, Error> {
        let size = std::mem::size_of::<TensorInfo>() as u32;
        let mut info = TensorInfo { size, dtype: 0, rank: 0, name: null(), shape: null() };
        self.check(unsafe { tc_input(self.0, 0, &mut info) })?;
        if info.dtype != FLOAT32 {
            return Err(Error { status: 4, text: "this example is for float32".into() });
        }
        let shape = unsafe { std::slice::from_raw_parts(info.shape, info.rank as usize) };
        let size = std::mem::size_of::<DimInfo>() as u32;
        shape
            .iter()
            .map(|&n| {
                let mut dim = DimInfo { size, batch: 0, name: null(), min: n, max: n };
                if n < 0 {
                    self.check(unsafe { tc_dim_at(self.0, (-(n + 1)) as u32, &mut dim) })?;
                }
                Ok(dim.min)
            })
            .collect()
    }

    fn run(&self, shape: &[i64], data: &mut [f32]) -> Result<(Vec<i64>, Vec<f32>), Error> {
        let mut input = Value {
            name: null(),
            data: data.as_mut_ptr().cast(),
            bytes: data.len() * 4,
            dtype: FLOAT32,
            rank: shape.len() as i32,
            shape: [0; 8],
        };
        input.shape[..shape.len()].copy_from_slice(shape);
        let mut output = Value { name: null(), data: null_mut(), bytes: 0, dtype: 0, rank: 0, shape: [0; 8] };
        self.check(unsafe { tc_output_shapes(self.0, &input, 1, &mut output, 1) })?;
        let mut result = vec![0f32; output.bytes / 4];
        output.data = result.as_mut_ptr().cast();
        self.check(unsafe { tc_run(self.0, &input, 1, &mut output, 1) })?;
        Ok((output.shape[..output.rank as usize].to_vec(), result))
    }

    fn output_name(&self) -> String {
        let size = std::mem::size_of::<TensorInfo>() as u32;
        let mut info = TensorInfo { size, dtype: 0, rank: 0, name: null(), shape: null() };
        match unsafe { tc_output(self.0, 0, &mut info) } {
            0 => unsafe { CStr::from_ptr(info.name) }.to_string_lossy().into_owned(),
            _ => String::new(),
        }
    }
}

fn classify(path: &str) -> Result<(), Error> {
    let bundle = Bundle::open(path)?;
    let shape = bundle.input_shape()?;
    let mut zeros = vec![0f32; shape.iter().product::<i64>() as usize];
    let (shape, values) = bundle.run(&shape, &mut zeros)?;
    println!("{}: {:?} {:?}", bundle.output_name(), shape, values);
    Ok(())
}

fn main() {
    assert_eq!(unsafe { tc_runtime_abi() }, ABI, "another version of the runtime");
    let path = std::env::args().nth(1).unwrap_or_default();
    if let Err(error) = classify(&path) {
        eprintln!("{}", error.text);
        std::process::exit(unsafe { tc_exit_code(error.status) });
    }
}
