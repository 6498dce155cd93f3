# recorder.S: a guest of one sector. It is assembled by
#   as --32 recorder.S -o r.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary r.o -o recorder.bin
#
# At boot it reads the record in every slot of its disk and says on the first
# serial port what it found; then it writes the next record at every tick of
# the clock (55 ms) and says so when the disk has answered. A record is two
# sectors on both sides of a granule's boundary. It switches itself off when
# the power button is pressed.
.code16
.set SLOTS, 128
.set FIRST, 7          # sector of slot 0: the last one of a granule
.set STRIDE, 128       # sectors from slot to slot
.set BUF, 0x8000       # the record: two sectors of MAGIC, number, life
.set MAGIC, 0x44524352
	.globl _start
_start:
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp
	sti
	cld
	movb %dl, drive
	movw $0x602, %dx       # let the power button be seen
	movw $0x100, %ax
	outw %ax, %dx
	rdtsc
	movl %eax, life
	movb $'\n', %al
	call putc
	movb $'B', %al
	call putc
	call eol
	xorl %ebp, %ebp        # the highest number found
	xorl %ebx, %ebx        # slot
scan:
	movl %ebx, %eax
	movb $0x42, %dh
	call disk
	jc scan
	movl BUF, %eax
	orl BUF+512, %eax
	jz next                # nothing was written here
	movb $'S', %al
	call putc
	movl %ebx, %eax
	call puthex
	movl $BUF, %esi
	movw $3, %cx
1:	lodsl
	call puthex
	loop 1b
	movl $BUF+512, %esi
	movw $3, %cx
2:	lodsl
	call puthex
	loop 2b
	call eol
	movl BUF+4, %eax
	cmpl BUF+516, %eax
	jne next
	cmpl %ebp, %eax
	jbe next
	movl %eax, %ebp
next:
	incw %bx
	cmpw $SLOTS, %bx
	jb scan
	movb $'R', %al
	call say               # running: life, number of the last record
tick:
	hlt
	movw $0x600, %dx
	inw %dx, %ax
	testb $1, %ah
	jnz off
	incl %ebp
	movw $BUF, %di
	movw $2, %cx
3:	movl $MAGIC, %eax
	stosl
	movl %ebp, %eax
	stosl
	movl life, %eax
	stosl
	addw $500, %di
	loop 3b
	leal -1(%ebp), %eax
	andl $(SLOTS-1), %eax
	movb $0x43, %dh
	call disk
	jc failed
	movb $'W', %al
	call say
	jmp tick
failed:
	movb $'E', %al
	call say
	decl %ebp
	jmp tick
off:
	movb $'P', %al
	call say
	movw $0x604, %dx
	movw $0x2000, %ax
	outw %ax, %dx
	hlt
	jmp off
# disk does function dh on the slot in eax; carry = an error.
disk:
	pushal
	imull $STRIDE, %eax, %eax
	addl $FIRST, %eax
	movl %eax, packet+8
	movb %dh, %ah
	xorb %al, %al
	movb drive, %dl
	movw $packet, %si
	int $0x13
	popal
	ret
# say prints al, the life and the number.
say:
	call putc
	movl life, %eax
	call puthex
	movl %ebp, %eax
	call puthex
eol:
	movb $'\n', %al
putc:
	pushw %dx
	pushw %ax
	movw $0x3fd, %dx
4:	inb %dx, %al
	testb $0x20, %al
	jz 4b
	popw %ax
	movw $0x3f8, %dx
	outb %al, %dx
	popw %dx
	ret
puthex:
	pushw %cx
	movw $8, %cx
5:	roll $4, %eax
	pushl %eax
	andb $15, %al
	addb $'0', %al
	cmpb $'9', %al
	jbe 6f
	addb $39, %al
6:	call putc
	popl %eax
	loop 5b
	movb $' ', %al
	call putc
	popw %cx
	ret
packet: .byte 16, 0
	.word 2, BUF, 0
	.long 0, 0
life:	.long 0
drive:	.byte 0
	.org 510
	.word 0xaa55
