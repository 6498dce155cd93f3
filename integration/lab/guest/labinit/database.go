package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"time"
)

// The database: SQLite with a write-ahead log on the first disk. A transaction
// moves money between two accounts and adds a numbered row to a log, so that a
// copy can be checked: the sum never changes, and the numbers have no gap.
const (
	databaseTool  = "/bin/sqlite3"
	accounts      = 50
	startingMoney = 100
	databasePages = 20 // of the write-ahead log before it goes into the file
)

// databaseFacts is what verifyDatabase asks, one line each.
const databaseFacts = "pragma integrity_check; select count(*), sum(money) from account; select count(*), coalesce(max(id), 0) from log;"

func (g *guest) database() string { return g.disks[0].file("database") }

// verifyDatabase opens the database as after any crash and checks all of it.
func (g *guest) verifyDatabase() {
	if !g.knobs.sql {
		return
	}
	if _, err := os.Stat(g.database()); errors.Is(err, fs.ErrNotExist) {
		return
	}
	out, err := exec.Command(databaseTool, "-batch", "-bail", g.database(), databaseFacts).CombinedOutput()
	if err != nil {
		g.say("ERROR op=database err=%q", err.Error()+": "+oneLine(string(out)))
		return
	}
	g.say("DATABASE %s", databaseVerdict(string(out)))
}

// databaseVerdict turns the answers into the words of an announcement. ok says
// that SQLite finds no fault, no money is lost and no row is missing.
func databaseVerdict(out string) string {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var n, money, rows, highest int
	if len(lines) == 3 {
		_, errAccounts := fmt.Sscanf(lines[1], "%d|%d", &n, &money)
		_, errLog := fmt.Sscanf(lines[2], "%d|%d", &rows, &highest)
		ok := errors.Join(errAccounts, errLog) == nil && lines[0] == "ok" &&
			n == accounts && money == accounts*startingMoney && rows == highest
		if ok {
			return fmt.Sprintf("ok=true highest=%d", highest)
		}
	}
	return fmt.Sprintf("ok=false %s", oneLine(out))
}

// startDatabase begins to commit and returns what ends it.
func (g *guest) startDatabase() (stop func()) {
	if !g.knobs.sql {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		if err := g.commitLoop(quit); err != nil {
			g.say("ERROR op=database err=%q", oneLine(err.Error()))
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// commitLoop runs one SQLite for as long as the guest runs: its log is open,
// in use and only partly written back at any moment.
func (g *guest) commitLoop(quit <-chan struct{}) error {
	cmd := exec.Command(databaseTool, "-batch", "-bail", g.database())
	cmd.Stderr = g.console
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s := &sqlite{in: in, out: bufio.NewScanner(out)}
	err = g.commitAll(s, quit)
	return errors.Join(err, in.Close(), cmd.Wait())
}

func (g *guest) commitAll(s *sqlite, quit <-chan struct{}) error {
	_, err := s.ask(fmt.Sprintf("pragma journal_mode=wal; pragma synchronous=full; pragma wal_autocheckpoint=%d; begin; "+
		"create table if not exists account(id integer primary key, money integer); create table if not exists log(id integer primary key, note blob); "+
		"insert or ignore into account with recursive n(i) as (select 1 union all select i+1 from n where i<%d) select i, %d from n; commit;",
		databasePages, accounts, startingMoney))
	if err != nil {
		return err
	}
	last, err := s.ask("select 'next ' || (coalesce(max(id), 0) + 1) from log;")
	if err != nil {
		return err
	}
	var n uint64
	if _, err := fmt.Sscanf(last, "next %d", &n); err != nil {
		return fmt.Errorf("%q: %w", last, err)
	}
	var said time.Time
	for ; ; n++ {
		select {
		case <-quit:
			return nil
		default:
		}
		_, err := s.ask(fmt.Sprintf("begin; update account set money=money-1 where id=%d; update account set money=money+1 where id=%d; insert into log values(%d, randomblob(3000)); commit;",
			1+rand.IntN(accounts), 1+rand.IntN(accounts), n))
		if err != nil {
			return fmt.Errorf("transaction %d: %w", n, err)
		}
		if time.Since(said) >= g.knobs.announce {
			g.say("COMMITTED n=%d", n)
			said = time.Now()
		}
	}
}

// sqlite is a running shell of SQLite's.
type sqlite struct {
	in  io.Writer
	out *bufio.Scanner
}

// answered ends what a question prints; SQLite ends at the first error.
const answered = "answered"

// ask runs statements, given on one line, and returns their last line once
// they are done.
func (s *sqlite) ask(text string) (last string, err error) {
	if _, err := io.WriteString(s.in, text+" select '"+answered+"';\n"); err != nil {
		return "", err
	}
	for s.out.Scan() {
		if s.out.Text() == answered {
			return last, nil
		}
		last = s.out.Text()
	}
	return "", errors.Join(s.out.Err(), fmt.Errorf("SQLite ended, its last words: %q", last))
}
