"""Command lines, read as QEMU reads them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpmerge.processes import commandline
from qmpmerge.processes.vms import _is_libvirts

QEMU = "qemu-system-x86_64"
STORAGE_DAEMON = "qemu-storage-daemon"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], ""),
        (["-name", "web"], "web"),
        (["--name", "web"], "web"),
        (["-name", "guest=web,debug-threads=on"], "web"),
        (["-name", "debug-threads=on,guest=web"], "web"),
        (["-name", "web,process=worker"], "web"),
        (["-name", "process=worker"], ""),
        (["-name", "guest=a,,b,process=c"], "a,b"),
        (["-name", "a=b"], ""),
        (["-name", "old", "-name", "guest=new"], "new"),
        (["-name", "web", "-name", "process=worker"], "web"),
        (["-name"], ""),
    ],
)
def test_name(options: list[str], name: str) -> None:
    line = commandline.parse([QEMU, "-S", *options], "/vm")
    assert line is not None and line.name == name


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ("-drive file=/vm/a,,b.qcow2,if=none,id=vda -drive if=none,id=cd", ["/vm/a,b.qcow2"]),
        ("-drive file=a.raw,format=raw -hda b.raw", ["/vm/a.raw", "/vm/b.raw"]),
        ("-drive file.driver=file,file.filename=/a.raw -drive driver=raw,file.filename=/b.raw", ["/a.raw", "/b.raw"]),
        ("-blockdev file,node-name=f,filename=a.raw -blockdev raw,node-name=a,file=f", ["/vm/a.raw"]),
        ('-blockdev {"driver":"raw","node-name":"a","file":{"driver":"file","filename":"/a.raw"}}', ["/a.raw"]),
        ("-blockdev {no-json -drive file=json:{} -blockdev", ["/vm/json:{}"]),
    ],
)
def test_images(options: str, images: list[str]) -> None:
    line = commandline.parse([QEMU, *options.split()], "/vm")
    assert line is not None and list(line.images) == images


@pytest.mark.parametrize(
    ("options", "monitors"),
    [
        # -qmp
        ("-qmp unix:/run/q,server=on,wait=off", ["/run/q"]),
        ("-qmp unix:/run/q,server,nowait", ["/run/q"]),
        ("-qmp-pretty unix:/run/q,server=yes", ["/run/q"]),
        ("--qmp unix:/run/q,wait=off,server=on", ["/run/q"]),
        ("-qmp unix:q,server=on", ["/vm/q"]),
        ("-qmp unix:./q,server=on", ["/vm/q"]),
        ("-qmp unix:../q,server=on", ["/vm/../q"]),
        ("-qmp unix:/run/a,,b,server=on", ["/run/a,b"]),
        ("-qmp unix:path=/run/q,server=on", ["/run/q"]),
        ("-qmp unix:/run/q,server=on -qmp unix:/run/r,server=on", ["/run/q", "/run/r"]),
        ("-qmp unix:/run/q,server=on -qmp unix:/run/q,server=on", ["/run/q"]),
        ("-qmp tcp:127.0.0.1:4444,server=on,wait=off", ["tcp:127.0.0.1:4444"]),
        ("-qmp tcp:vmhost:4444,server", ["tcp:vmhost:4444"]),
        ("-qmp tcp::4444,server", ["tcp:127.0.0.1:4444"]),
        ("-qmp tcp:0.0.0.0:4444,server", ["tcp:127.0.0.1:4444"]),
        ("-qmp tcp:[::]:4444,server", ["tcp:[::1]:4444"]),
        # -chardev with -mon
        ("-chardev socket,id=m,path=/run/q,server=on,wait=off -mon chardev=m,mode=control", ["/run/q"]),
        ("-chardev socket,id=m,path=/run/q,server,nowait -mon m,mode=control,pretty=on", ["/run/q"]),
        ("-mon mode=control,chardev=m -chardev server=on,path=/run/q,id=m,backend=socket", ["/run/q"]),
        ("-chardev socket,id=m,path=q,server=on -qmp chardev:m", ["/vm/q"]),
        ("-chardev socket,id=m,path=/run/a,,b,server=on -mon m,mode=control", ["/run/a,b"]),
        ("-chardev socket,id=m,host=::1,port=44,server=on -mon m,mode=control", ["tcp:[::1]:44"]),
        ("-chardev socket,id=m,port=44,server=on -mon m,mode=control", ["tcp:127.0.0.1:44"]),
        ("-chardev socket,id=m,fd=3,server=on -mon m,mode=control", ["fd:3"]),
        # no QMP, or none that a client can reach
        ("-qmp unix:/run/q", []),
        ("-qmp unix:/run/q,server=off", []),
        ("-qmp unix:/run/q,server=no", []),
        ("-qmp unix:/run/q,server=on,abstract=on", []),
        ("-qmp tcp:localhost:44", []),
        ("-qmp tcp:localhost:0,server=on", []),
        ("-qmp tcp:localhost:qmp,server=on", []),
        ("-qmp tcp:localhost,server=on", []),
        ("-qmp tcp:localhost:44,server=on,telnet=on", []),
        ("-qmp telnet:localhost:44,server=on", []),
        ("-qmp stdio", []),
        ("-qmp none", []),
        ("-qmp chardev:missing", []),
        ("-qmp", []),
        ("-monitor unix:/run/q,server=on", []),
        ("-serial unix:/run/q,server=on", []),
        ("-chardev socket,id=m,path=/run/q,server=on", []),
        ("-chardev socket,id=m,path=/run/q,server=on -mon chardev=m", []),
        ("-chardev socket,id=m,path=/run/q,server=on -mon m,mode=readline", []),
        ("-chardev socket,id=m,path=/run/q,server=on -monitor chardev:m", []),
        ("-chardev socket,id=m,path=/run/q,server=on -mon other,mode=control", []),
        ("-chardev socket,id=m,host=h,port=44,server=on,tls-creds=t -mon m,mode=control", []),
        ("-chardev socket,id=m,fd=3 -mon m,mode=control", []),
        ("-chardev stdio,id=m -mon m,mode=control", []),
        ("-chardev pty,id=m,path=/run/q,server=on -mon m,mode=control", []),
    ],
)
def test_monitors(options: str, monitors: list[str]) -> None:
    line = commandline.parse([QEMU, "-S", *options.split(" "), "disk.img"], "/vm")
    assert line is not None and list(line.monitors) == monitors


@pytest.mark.parametrize(
    ("options", "monitors"),
    [
        ("--chardev socket,id=m,path=q,server=on,wait=off --monitor chardev=m", ["/vm/q"]),
        ("--chardev=socket,id=m,path=q,server=on --monitor=m,mode=control", ["/vm/q"]),
        ("--chardev socket,id=m,fd=5,server=on --monitor m", ["fd:5"]),
        ('--chardev socket,id=m,path=q,server=on --monitor {"chardev":"m","pretty":true}', ["/vm/q"]),
        ("--chardev socket,id=m,path=q,server=on", []),
        ("--monitor {not-json", []),
        ("--monitor []", []),
    ],
)
def test_monitors_of_the_storage_daemon(options: str, monitors: list[str]) -> None:
    line = commandline.parse(["/usr/bin/qemu-storage-daemon", *options.split(" ")], "/vm")
    assert line is not None and list(line.monitors) == monitors


def test_relative_path_is_no_use_without_the_folder() -> None:
    line = commandline.parse([QEMU, "-qmp", "unix:q,server=on", "-qmp", "unix:/run/q,server=on"], None)
    assert line is not None and line.monitors == ("/run/q",)


@pytest.mark.parametrize(
    ("argv", "exe", "program"),
    [
        ([QEMU], "", QEMU),
        (["/usr/libexec/qemu-kvm"], "", "qemu-kvm"),
        (["kvm"], "/usr/bin/qemu-system-x86_64", "kvm"),
        (["/usr/bin/qemu-system-aarch64 (deleted)"], "", "qemu-system-aarch64"),
        (["my vm"], "/usr/bin/qemu-system-ppc64 (deleted)", "qemu-system-ppc64"),
        (["x"], "/nix/store/x/.qemu-system-x86_64-wrapped", ".qemu-system-x86_64-wrapped"),
        (["/lib64/ld-linux-x86-64.so.2", "/opt/qemu-system-x86_64", "-S"], "", QEMU),
        (["ld.so", "--library-path", "/qemu-kvm", "--inhibit-cache", "/o/qemu-system-arm"], "", "qemu-system-arm"),
        (["ld-linux.so.2", "--argv0", QEMU, "/bin/ls"], "", ""),
        (["/lib/ld-musl-x86_64.so.1", "/bin/cat", QEMU], "", ""),
        (["qemu", "/o/qemu-system-arm"], "/lib64/ld-linux-x86-64.so.2", "qemu-system-arm"),
        (["ld.so"], "", ""),
        (["/bin/sh", "/usr/local/bin/qemu-system-x86_64"], "/usr/bin/dash", ""),
        (["vim", QEMU], "/usr/bin/vim", ""),
        (["qemu-img", "convert"], "", ""),
        (["qemu-x86_64", "ls"], "", ""),
        ([], "/usr/bin/qemu-system-x86_64", ""),
        ([""], "", ""),
    ],
)
def test_program(argv: list[str], exe: str, program: str) -> None:
    line = commandline.parse(argv, "/vm", exe)
    assert (line.program if line is not None else "") == program


@pytest.mark.parametrize(
    ("folder", "libvirt"),
    [
        ("/var/lib/libvirt/qemu/domain-7-web", True),
        ("/run/libvirt/qemu", True),
        ("/var/run/libvirt/qemu", True),
        ("/run/user/1000/libvirt/qemu/run", True),
        ("/home/me/.config/libvirt/qemu/lib/domain-7-web", True),
        ("/home/me/src/libvirt/qemu", False),
        ("/run/vms/libvirt", False),
        ("/var/lib/libvirt-like", False),
    ],
)
def test_libvirts_folders(folder: str, libvirt: bool) -> None:
    assert _is_libvirts(f"{folder}/monitor.sock") is libvirt


@pytest.mark.parametrize(
    ("chardev", "libvirt"),
    [
        ("socket,id=charmonitor,fd=30,server=on,wait=off", True),
        ("socket,id=charmonitor,path=/tmp/q,server=on,wait=off", False),
        ("socket,id=mine,fd=30,server=on,wait=off", False),
    ],
)
def test_libvirts_own_id(chardev: str, libvirt: bool) -> None:
    line = commandline.parse([QEMU, "-name", "guest=web", "-chardev", chardev], "/vm")
    assert line is not None and line.libvirt is libvirt


OPTIONS = ["-qmp", "--qmp", "-mon", "--monitor", "-chardev", "-name", "--name=", "-", "--", ""]
PIECES = ["unix:", "tcp:", "chardev:m", "socket", "id=m", "chardev=m", "mode=control", "server=on", "fd=3", "path=a"]
PIECES += ["host=h", "port=1", "{", "}", "[]", '"', ",", ",,", "=", ":", "9", "\0", "\udc80", "é"]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(OPTIONS) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join), max_size=8),
    st.sampled_from([QEMU, STORAGE_DAEMON, "ld.so", ""]),
    st.none() | st.just("/vm"),
)
def test_odd_command_lines(words: list[str], program: str, cwd: str | None) -> None:
    line = commandline.parse([program, *words], cwd)
    for address in line.monitors if line is not None else ():
        assert address.startswith(("/", "tcp:", "fd:"))


def test_long_numbers() -> None:
    line = commandline.parse([QEMU, "-qmp", f"tcp:h:{'9' * 5000},server=on", "-mon", "{" * 5000], "/vm")
    assert line is not None and line.monitors == ()
