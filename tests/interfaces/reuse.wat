;; Fills everything an instance has with a secret, or looks for it there: its memory up to `pages`, its tables up to `elements`,
;; its globals. For a word the secret is 0x5ec4e75ec4e75ec4; for a table, whatever is not null.
(component
  (core module $m
    (memory 2)
    ;; So that a part of the memory is mapped from the artefact, as a toolchain's data is.
    (data (i32.const 70000) "what the memory of each instance begins with")
    (table $functions 8 funcref)
    (elem declare func $function)
    (func $function)
    (global $word (mut i64) (i64.const 0))
    (global $vector (mut v128) (v128.const i64x2 0 0))
    (global $reference (mut funcref) (ref.null func))

    (func $grow (param $pages i32) (param $elements i32) (param $with funcref)
      (drop (memory.grow (i32.sub (local.get $pages) (memory.size))))
      (drop (table.grow $functions (local.get $with) (i32.sub (local.get $elements) (table.size $functions)))))

    (func (export "write") (param $pages i32) (param $elements i32)
      (local $at i32)
      (call $grow (local.get $pages) (local.get $elements) (ref.func $function))
      (table.fill $functions (i32.const 0) (ref.func $function) (table.size $functions))
      (global.set $word (i64.const 0x5ec4e75ec4e75ec4))
      (global.set $vector (i64x2.splat (i64.const 0x5ec4e75ec4e75ec4)))
      (global.set $reference (ref.func $function))
      (loop $next
        (i64.store (local.get $at) (i64.const 0x5ec4e75ec4e75ec4))
        (local.set $at (i32.add (local.get $at) (i32.const 8)))
        (br_if $next (i32.lt_u (local.get $at) (i32.mul (memory.size) (i32.const 65536))))))

    ;; How many words of the memory are the secret, in the upper half; in the lower, how many are not zero.
    (func (export "memory") (param $pages i32) (param $elements i32) (result i64)
      (local $at i32) (local $found i64) (local $word i64)
      (call $grow (local.get $pages) (local.get $elements) (ref.null func))
      (loop $next
        (local.set $word (i64.load (local.get $at)))
        (if (i64.ne (local.get $word) (i64.const 0))
          (then
            (local.set $found (i64.add (local.get $found) (i64.const 1)))
            (if (i64.eq (local.get $word) (i64.const 0x5ec4e75ec4e75ec4))
              (then (local.set $found (i64.add (local.get $found) (i64.const 0x100000000)))))))
        (local.set $at (i32.add (local.get $at) (i32.const 8)))
        (br_if $next (i32.lt_u (local.get $at) (i32.mul (memory.size) (i32.const 65536)))))
      (local.get $found))

    ;; How many elements of the tables are not null.
    (func (export "tables") (result i32)
      (local $at i32) (local $found i32)
      (loop $next
        (if (i32.eqz (ref.is_null (table.get $functions (local.get $at))))
          (then (local.set $found (i32.add (local.get $found) (i32.const 1)))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br_if $next (i32.lt_u (local.get $at) (table.size $functions))))
      (local.get $found))

    ;; How many globals are not what they begin with.
    (func (export "globals") (result i32)
      (i32.add
        (i32.add (i64.ne (global.get $word) (i64.const 0)) (v128.any_true (global.get $vector)))
        (i32.eqz (ref.is_null (global.get $reference)))))
  )
  (core instance $i (instantiate $m))
  (func (export "write") (param "pages" u32) (param "elements" u32) (canon lift (core func $i "write")))
  (func (export "memory") (param "pages" u32) (param "elements" u32) (result u64) (canon lift (core func $i "memory")))
  (func (export "tables") (result u32) (canon lift (core func $i "tables")))
  (func (export "globals") (result u32) (canon lift (core func $i "globals")))
)
