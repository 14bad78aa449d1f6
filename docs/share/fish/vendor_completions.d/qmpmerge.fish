function _qmpmerge_completion
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l answers (env COMP_ARGS=(string join \n -- $words[2..] | string collect) COMP_WORD=$word \
        _QMPMERGE_COMPLETE=fish_complete $words[1] 2>/dev/null)
    for answer in $answers
        set -l parts (string split -m 1 , -- $answer)
        switch $parts[1]
            case dir
                __fish_complete_directories $word
            case file
                __fish_complete_path $word
            case open plain
                echo $parts[2]
        end
    end
end
complete --no-files --command qmpmerge --arguments "(_qmpmerge_completion)"
